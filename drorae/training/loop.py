"""What both training loops are given and hand back: checkpoints, logging, progress, evaluators."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from drorae.config import Compute
from drorae.training.world import World

__all__ = ["Checkpointing", "LoopTools", "TrainReport"]


class Checkpointing(Protocol):
    """Where a loop keeps its state."""

    def latest(self) -> dict[str, Any] | None:
        """Newest saved state, on the CPU; None if there is none."""
        ...

    def due(self, step: int) -> bool:
        """Whether a checkpoint should follow `step` finished steps."""
        ...

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Keep the state after `step` finished steps."""
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
    evaluators: Sequence[Callable[[int], dict[str, float]]] = ()
    """Each is called on rank 0 with the step while the EMA weights are in place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainReport:
    """What a finished loop hands back."""

    ema: dict[str, Tensor]
    """Averaged parameters."""
    history: list[dict[str, float]]
    """Every logged row, those of earlier attempts included."""
