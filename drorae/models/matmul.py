"""Matrix products in float32 on a CPU through oneDNN; everywhere else PyTorch's own.

PyTorch sends float32 products on x86 to MKL, which runs at half speed on AMD's processors: measured
2026-11-24 on one core of an AMD EPYC (Zen 5, torch 2.15), 768 x 3072 on 1024 rows: MKL 108
GFLOP/s, oneDNN 238. Both sum in float32, in another order, so results agree to rounding. Under
autocast, in other types, on other devices, inside torch.compile and with
`torch.backends.mkldnn.enabled` off nothing changes.

Trade-off: oneDNN's product is an internal operator of PyTorch (`mkldnn::_linear_pointwise`, there
for torch.compile); a build without it takes the ordinary path.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from drorae.shapes import Float, Tensor

__all__ = [
    "Linear",
    "NumberFormat",
    "batched_product",
    "linear",
    "number_format",
    "suits_onednn",
    "use_faster_products",
]

NumberFormat = Literal["float32", "tf32", "bfloat16"]
"""Of the factors of matrix products and convolutions; sums are float32."""

MIN_MULTIPLICATIONS = 1 << 20  # below, the call itself costs more than the faster kernel saves


def batched_product(
    left: Float[Tensor, "batch rows inner"],
    right: Float[Tensor, "batch inner columns"],
    bias: Float[Tensor, "batch 1 columns"] | None = None,
    *,
    out: Float[Tensor, "batch rows columns"] | None = None,
) -> Float[Tensor, "batch rows columns"]:
    """One product per batch entry, plus a bias; not differentiable.

    Args:
        left: First factors.
        right: Second factors.
        bias: Added to every row.
        out: Where to write the result; only without a bias.
    """
    if not suits_onednn(left, right, left.shape[1] * right.shape[1] * right.shape[2]):
        return torch.bmm(left, right, out=out) if bias is None else torch.baddbmm(bias, left, right)
    lefts, rights = left.contiguous().unbind(0), right.mT.unbind(0)
    biases = [None] * len(lefts) if bias is None else bias.squeeze(1).unbind(0)
    products = [_onednn(x, w, b) for x, w, b in zip(lefts, rights, biases, strict=True)]
    if len(products) == 1 and out is None:
        return products[0][None]
    return torch.stack(products, out=out)


def linear(
    states: Float[Tensor, "*batch inner"],
    weight: Float[Tensor, "columns inner"],
    bias: Float[Tensor, " columns"] | None = None,
) -> Float[Tensor, "*batch columns"]:
    """`F.linear` with the faster product; differentiable."""
    if not suits_onednn(states, weight, states.numel() * len(weight)):
        return F.linear(states, weight, bias)
    if not torch.is_grad_enabled():
        return _onednn(states, weight, bias)
    out = _OneDnnLinear.apply(states, weight, bias)
    assert isinstance(out, Tensor)
    return out


class Linear(nn.Linear):
    """`nn.Linear` with the faster product; same parameters, same keys."""

    def forward(self, input: Float[Tensor, "*batch inner"]) -> Float[Tensor, "*batch columns"]:
        """Apply to the last axis."""
        return linear(input, self.weight, self.bias)


def use_faster_products(network: nn.Module) -> None:
    """Replace every plain `nn.Linear` inside a network by ours, with the same parameters and names.

    For networks of other libraries: a frozen encoder spends nearly all of its time there.
    """
    plain = {name: m for name, m in network.named_modules() if name and type(m) is nn.Linear}
    for name, layer in plain.items():
        faster = Linear(layer.in_features, layer.out_features, device="meta")
        faster.weight, faster.bias = layer.weight, layer.bias
        network.set_submodule(name, faster)


def suits_onednn(first: Tensor, second: Tensor, multiplications: int) -> bool:
    """Whether one product of two such factors goes to oneDNN, by itself and on all threads.

    Args:
        first: A factor.
        second: The other.
        multiplications: Rows times columns times summands.
    """
    return (
        multiplications >= MIN_MULTIPLICATIONS
        and first.device.type == "cpu"
        and first.dtype == second.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@contextmanager
def number_format(precision: NumberFormat, device_type: str) -> Iterator[None]:
    """Compute products and convolutions in a format meanwhile; what was set before comes back.

    `tf32` uses a GPU's TF32 units and is float32 elsewhere; `bfloat16` is autocast, in which what
    autocast leaves out may use TF32.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    try:
        with torch.autocast(device_type, torch.bfloat16, enabled=precision == "bfloat16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - hidden by the decorator
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            _onednn(grad, weight.T) if needs_x else None,
            _onednn(rows.T, x.flatten(0, -2).T) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
