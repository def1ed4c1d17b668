"""What both training loops are given and hand back: checkpoints, logging, progress, evaluators."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from drorae.config import Compute
from drorae.training.world import World

__all__ = ["Checkpointing", "LoopTools", "TrainReport"]


class Checkpointing(Protocol):
    """Where a loop keeps its state. Only rank 0 reads and writes."""

    def latest(self) -> dict[str, Any] | None:
        """Newest saved state, on the CPU; None if there is none."""
        ...

    def due(self, step: int) -> bool:
        """Whether a checkpoint should follow `step` finished steps, whatever the time."""
        ...

    def overdue(self) -> bool:
        """Whether so much time has passed that the next log point should save."""
        ...

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Keep the state after `step` finished steps; the loop goes on changing its tensors."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopTools:
    """Everything a loop touches outside its own arithmetic."""

    world: World
    compute: Compute
    checkpoints: Checkpointing
    log: Callable[[dict[str, float], int], None]
    """Receives metrics and the step, on rank 0."""
    progress: Callable[[int, int], None]
    """Receives finished and total images, on rank 0."""
    catch_up: Callable[[Sequence[Mapping[str, float]]], None] = lambda rows: None
    """Receives the rows that earlier attempts logged, after a resume, on rank 0."""
    evaluators: Sequence[Callable[[int, str], dict[str, float]]] = ()
    """Each is called on every rank with the step and the first part of its metrics' names: `eval`
    while the EMA weights are in place, `eval_online` with those that are trained. Every rank gets
    the metrics of all of them together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainReport:
    """What a finished loop hands back; the weights are whole on rank 0."""

    ema: dict[str, Tensor]
    """Averaged parameters."""
    weights: dict[str, Tensor]
    """The trained module's state dict."""
    history: list[dict[str, float]]
    """Every logged row, those of earlier attempts included."""
