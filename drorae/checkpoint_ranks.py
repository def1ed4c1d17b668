"""How the ranks that write a checkpoint together agree, and what of a tensor lies on each."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from drorae.failure import Failure, describe_failure, failure_as_error

__all__ = ["Ranks", "local_part"]

T = TypeVar("T")


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor on this rank, sharing memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Ranks:
    """The processes that save together, joined by a process group of their own (gloo).

    Without torch.distributed, or alone in it, nothing is sent.

    Args:
        timeout_s: How long they wait for each other. Whatever comes after a wait that was too long
            fails as well.
    """

    def __init__(self, timeout_s: float) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.count = dist.get_world_size() if together else 1
        self._group: Any = None
        if self.count > 1:
            timeout = timedelta(seconds=timeout_s)
            self._group = dist.new_group(backend="gloo", timeout=timeout)

    def exchange(self, value: T) -> list[T]:
        """Everyone's value, by rank (a collective)."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    def from_main(self, make: Callable[[], T]) -> T:
        """What rank 0 made (a collective); an exception of `make` is raised on every rank."""
        if self.count == 1:
            return make()
        box: list[Any] = [None, None]
        error: Exception | None = None
        if self.rank == 0:
            try:
                box[0] = make()
            except Exception as raised:  # the others wait for an answer, whatever it is
                error, box[1] = raised, describe_failure(raised)
        dist.broadcast_object_list(box, src=0, group=self._group)
        made, failure = cast(tuple[T, Failure | None], tuple(box))
        if failure is not None:
            raise error or failure_as_error(failure)
        return made

    @torch.no_grad()
    def put(self, tensor: Tensor, value: Tensor | None, owner: int) -> None:
        """Bring a tensor to its value (a collective for one that all ranks hold alike).

        Args:
            tensor: Changed in place.
            value: Of this rank's part; None where the owner has it.
            owner: The rank that has the value of a whole tensor.
        """
        part = local_part(tensor)
        if value is not None:
            part.copy_(value)
        if self.count == 1 or isinstance(tensor, DTensor):
            return
        whole = part.contiguous()
        raw = whole.view(-1).view(torch.uint8)  # gloo and NCCL do not know every type
        dist.broadcast(raw, src=owner, group=None if whole.is_cuda else self._group)
        if whole is not part:
            part.copy_(whole)
