"""Who this process is among the training workers, and what loops need to act as one.

`World` is a plain value; beside it stand the gradient-averaging wrapper and the mean over ranks.
"""

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

__all__ = ["World", "autocast", "mean_over_ranks", "part_slices", "wrap_ddp"]

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Rank, number of ranks and device of this process."""

    rank: int = 0
    """0 .. world_size - 1; rank 0 logs and writes."""
    world_size: int = 1
    """Number of training processes."""
    device: torch.device = CPU
    """Where this process computes."""

    is_on_one_machine: bool = True
    """Whether all processes run on one machine."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank} does not fit world_size={self.world_size}.")

    @property
    def is_main(self) -> bool:
        """Whether this rank logs and writes."""
        return self.rank == 0

    def local_batch(self, global_batch: int, name: str, num_parts: int = 1) -> int:
        """Images of one global batch that this rank takes.

        Raises:
            ValueError: The batch does not divide over ranks and parts; names two sizes that do.
        """
        if num_parts > 1 and global_batch % (self.world_size * num_parts):
            unit = self.world_size * num_parts
            low = global_batch // unit * unit
            raise ValueError(
                f"{name}={global_batch} does not divide over {self.world_size} workers in "
                f"compute.accumulate_steps={num_parts} parts each; use {max(low, unit)} or "
                f"{low + unit}."
            )
        if global_batch % self.world_size:
            low = global_batch // self.world_size * self.world_size
            raise ValueError(
                f"{name}={global_batch} does not divide over {self.world_size} workers; "
                f"use {max(low, self.world_size)} or {low + self.world_size}."
            )
        return global_batch // self.world_size


def wrap_ddp(module: nn.Module, world: World) -> nn.Module:
    """DistributedDataParallel when there is more than one rank, else the module itself."""
    if world.world_size == 1:
        return module
    return nn.parallel.DistributedDataParallel(module, **_keep_buffers())


def _keep_buffers() -> dict[str, Any]:
    """Leave buffers alone in forward passes: all ranks compute the same ones.

    torch 2.13 renamed the option. Under the new name buffers are still sent once, at the start.
    """
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return {name: False}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Forward passes in bfloat16 where the precision says so; otherwise as the tensors are."""
    if precision != "bfloat16":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def part_slices(num_images: int, num_parts: int) -> list[slice]:
    """Equal, contiguous parts of a rank's batch.

    Raises:
        ValueError: The images do not divide into so many parts.
    """
    if num_images % num_parts:
        raise ValueError(
            f"compute.accumulate_steps={num_parts} does not divide the {num_images} images of a "
            "worker: expected equal parts; use a divisor."
        )
    size = num_images // num_parts
    return [slice(start, start + size) for start in range(0, num_images, size)]


def mean_over_ranks(values: Tensor, world: World) -> Tensor:
    """Average a tensor over all ranks (a collective when there is more than one)."""
    if world.world_size > 1:
        dist.all_reduce(values)
        values /= world.world_size
    return values
