"""What both training loops are given and hand back: checkpoints, logging, progress, evaluators."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from drorae.config import Compute
from drorae.training.world import World

__all__ = ["Checkpointing", "LoopTools", "TrainReport"]


class Checkpointing(Protocol):
    """Where a loop keeps its state. Every rank reads and writes its part."""

    def restore(self, tensors: Callable[[], Mapping[str, Tensor]]) -> dict[str, Any] | None:
        """Fill tensors with the newest saved ones (a collective).

        Args:
            tensors: Gives those to fill; called if there is something to fill them with.

        Returns:
            The small state saved with them; None, and nothing filled, if there is none.
        """
        ...

    def due(self, step: int) -> bool:
        """Whether a checkpoint should follow `step` finished steps, whatever the time."""
        ...

    def overdue(self) -> bool:
        """Whether so much time has passed that the next log point should save."""
        ...

    def save(self, step: int, tensors: Mapping[str, Tensor], small: dict[str, Any]) -> None:
        """Keep the state after `step` finished steps; the loop goes on changing its tensors.

        Args:
            step: Finished steps.
            tensors: Weights, moments and averages by name, the same names on every rank.
            small: Everything else, on rank 0.
        """
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
