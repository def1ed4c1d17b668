"""Count parameters, FLOPs and kept activations of a module on the meta device.

A FLOP is one addition or one multiplication of a matrix product, convolution or attention, as
torch's counter has it; normalisations and activations are left out, a few percent.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["NetworkCost", "Role", "count_activations", "count_flops", "measure"]

Role = Literal["trained", "passed", "frozen"]
"""trained: gradients of weights and input; passed: of the input only; frozen: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkCost:
    """One network, for one image."""

    name: str
    parameters: int
    """Values in its weights, fixed tables included."""
    trainable: int
    """Those with gradients when it is trained."""
    step_flops: dict[Role, int]
    """FLOPs of forward and backward pass, by role."""
    activation_bytes: dict[Role, int]
    """What autograd keeps of one image until the backward pass, in float32, by role."""

    @property
    def forward_flops(self) -> int:
        """FLOPs of one forward pass."""
        return self.step_flops["frozen"]


def measure(
    name: str,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    parameters: int | None = None,
    roles: tuple[Role, ...] = ("passed", "trained"),
) -> NetworkCost:
    """Count a module.

    Args:
        name: Shown in tables.
        module: On the meta device, in eval mode; its parameters' `requires_grad` is what trains.
        inputs: Arguments for one image; gradients go to those of floating point.
        parameters: Number to show, where weights lie in buffers.
        roles: Roles in which it occurs, beside frozen; each takes a backward pass to count.
    """
    counted = sum(parameter.numel() for parameter in module.parameters())
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    trainable = sum(parameter.numel() for parameter in trained)
    flops: dict[Role, int] = {"frozen": count_flops(module, inputs)}
    kept: dict[Role, int] = {"frozen": 0}
    for role in roles:
        for parameter in trained:
            parameter.requires_grad_(role == "trained")
        flops[role] = count_flops(module, inputs, backward=True)
        kept[role] = count_activations(module, inputs)
    for parameter in trained:
        parameter.requires_grad_(True)
    return NetworkCost(
        name=name,
        parameters=counted if parameters is None else parameters,
        trainable=trainable,
        step_flops=flops,
        activation_bytes=kept,
    )


def count_flops(
    forward: Callable[..., Any], inputs: tuple[Tensor, ...], *, backward: bool = False
) -> int:
    """FLOPs of one call, with gradients of input and trained weights if `backward`."""
    counter = FlopCounterMode(display=False)
    with torch.set_grad_enabled(backward), counter:
        output = forward(*(_leaf(x) if backward else x for x in inputs))
        if backward:
            parts = output if isinstance(output, list | tuple) else (output,)
            wanted = [part for part in parts if part.requires_grad]
            torch.autograd.backward(wanted, [torch.empty_like(part) for part in wanted])
    return int(counter.get_total_flops())


def count_activations(module: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once, no weights.

    Attention is taken as a fused kernel that keeps query, key, value and output; on the meta device
    torch would write out the matrix of scores.
    """
    inputs = tuple(_leaf(x) for x in inputs)
    weights = {_storage(tensor) for tensor in _tensors(module)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in weights:
            kept[_storage(tensor)] = tensor  # the reference keeps its storage's address unique
        return tensor

    with _fused_attention(), saved_tensors_hooks(keep, lambda tensor: tensor), torch.enable_grad():
        output = module(*inputs)  # alive until counted
        total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        del output
    return total


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


class _Fused(torch.autograd.Function):
    """Shape and memory of fused attention; computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output


class _FusedAttentionMode(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Fused.apply(*args[:3])
        return func(*args, **(kwargs or {}))


@contextmanager
def _fused_attention() -> Iterator[None]:
    with _FusedAttentionMode():
        yield
