"""How a trained network is spread over ranks: whole on each (DDP) or in shards (FSDP2).

Loops hold the wrapped module for forward passes and the plain one (`unwrapped`) for everything
else. Under FSDP2 the plain module's parameters, their gradients, AdamW's moments and the EMA are
DTensors: arithmetic goes to the shard of this rank (`local`), files and evaluation to the whole
(`whole`, a collective). Compilation is done inside the module (`nn.Module.compile`), so no name and
no parameter changes, and whatever swaps weights in place reaches the compiled code.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from drorae.config import Compute
from drorae.training.world import World, wrap_ddp

__all__ = [
    "agreed",
    "distribute",
    "gradient_sync",
    "is_sharded",
    "local",
    "set_recompute",
    "total_norm",
    "unwrapped",
    "whole",
    "whole_on_main",
]

COMPILE_BACKEND = "inductor"


def distribute(module: nn.Module, world: World, compute: Compute) -> nn.Module:
    """Prepare a module that is trained: recomputation, compilation, then DDP or FSDP2.

    Every rank must hold the same weights. A single rank needs no wrapper, whatever the sharding.
    """
    if compute.activation_checkpointing:
        set_recompute(module)
    shards = compute.sharding == "fsdp2" and world.world_size > 1
    if compute.compile:
        # FSDP2 gathers weights between blocks, which a graph of the whole would break anyway.
        for part in (_blocks(module) if shards else []) or [module]:
            part.compile(backend=COMPILE_BACKEND)
    if shards:
        return _shard(module, world, compute.reduce_dtype)
    wrapped = wrap_ddp(module, world)
    if compute.reduce_dtype == "bfloat16" and isinstance(
        wrapped, nn.parallel.DistributedDataParallel
    ):
        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def _shard(module: nn.Module, world: World, reduce_dtype: str) -> nn.Module:
    mesh = init_device_mesh(world.device.type, (world.world_size,))
    policy = MixedPrecisionPolicy(reduce_dtype=getattr(torch, reduce_dtype))
    for block in _blocks(module):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # Without resharding, a forward pass that no backward pass follows (fakes, evaluation) would
    # leave the root's gathered weights in place, and the next step would use them stale.
    fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    return module


def _blocks(module: nn.Module) -> list[nn.Module]:
    """Members of the module's lists of layers."""
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
    return [block for layers in lists for block in layers]


def set_recompute(module: nn.Module) -> None:
    """Switch on recomputation in every part of a network that knows it."""
    for part in module.modules():
        for name in ("recompute", "activation_checkpointing"):
            if isinstance(getattr(part, name, None), bool):
                setattr(part, name, True)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside a DDP wrapper, or the module itself."""
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


@contextmanager
def gradient_sync(module: nn.Module, enabled: bool) -> Iterator[None]:
    """Run forward and backward with gradients averaged over ranks, or only added up on each.

    Args:
        module: From `distribute`.
        enabled: False for all but the last part of an accumulated batch.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)
    is_ddp = isinstance(module, nn.parallel.DistributedDataParallel)
    with module.no_sync() if is_ddp and not enabled else nullcontext():
        yield


def is_sharded(module: nn.Module) -> bool:
    """Whether whole tensors are gathered from all ranks, which must then all take part."""
    return isinstance(module, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """The part on this rank, sharing memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor (a collective for a sharded one)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_on_main(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Full tensors on rank 0, sharded ones gathered one by one on the host; others get nothing."""
    found = {}
    for name, value in tensors.items():
        full = whole(value.detach())
        if world.is_main:
            found[name] = full.cpu() if isinstance(value, DTensor) else full
    return found


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Norm of all gradients together, over all ranks."""
    return whole(nn.utils.get_total_norm(gradients)).detach()


def agreed(flag: Tensor, world: World) -> Tensor:
    """A 0/1 flag that is 1 on every rank if it is on any (a collective)."""
    if world.world_size > 1:
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return flag
