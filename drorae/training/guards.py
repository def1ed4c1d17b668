"""Guards of a training loop: what happens to a step whose loss or gradient is not finite.

The flag lives on the device and is the same on every rank. The fused optimiser leaves the step out
(`found_inf`), so the weights stay those of the last good step, without a host synchronisation; the
host reads where it synchronises anyway, at a log or save point. `stop` leaves out every later step
too, and the host raises. `skip` leaves out that step alone and counts.

`spike_score` says how far a loss lies outside of the last ones. It only reports.
"""

import statistics
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from drorae.config import canonical_json
from drorae.failure import Fatal
from drorae.training.parallel import agreed
from drorae.training.world import World

__all__ = ["SPIKE_SCORE", "SPIKE_WINDOW", "FiniteGuard", "spike_score"]

SPIKE_WINDOW = 50
"""Log points that a loss is compared with."""
SPIKE_MIN = 10
"""Log points below which there is no score."""
SPIKE_SCORE = 8.0
"""Score that is warned of: a normal loss reaches 5 about once in a million log points."""
NORMAL_MAD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


class FiniteGuard:
    """Keeps steps with a loss or gradient that is not finite from an optimiser.

    Args:
        optimizer: A fused one.
        device: Where its parameters lie.
        policy: What such a step does.
        world: Ranks that must agree.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        policy: Literal["stop", "skip"] = "stop",
        world: World | None = None,
    ) -> None:
        self._policy = policy
        self._world = world or World()
        self._first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        # steps left out: in all, in a row until now, longest row since `restart`
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)
        self._optimizer = optimizer
        optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]

    def arm(self, step: int, *values: Tensor) -> None:
        """Call before `optimizer.step()`: a value that is not finite skips it on the device."""
        finite = torch.stack([value.detach().float() for value in values]).isfinite().all()
        bad = agreed((~finite).float(), self._world)
        if self._policy == "skip":
            self._count(bad.long())
        else:
            fresh = bad.bool() & (self._first_bad_step < 0)
            self._first_bad_step.masked_fill_(fresh, step)
            bad = (self._first_bad_step >= 0).float()
        self._optimizer.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]

    def _count(self, bad: Tensor) -> None:
        total, row, longest = self._counts
        row = (row + 1) * bad
        self._counts = torch.stack([total + bad, row, torch.maximum(longest, row)])

    def check(self, stage: str, config: object) -> None:
        """Raise if any step so far was bad and the policy is to stop (one host synchronisation).

        Raises:
            Fatal: Names the first bad step and the configuration.
        """
        if self._policy == "skip":
            return
        step = int(self._first_bad_step)
        if step >= 0:
            raise Fatal(
                f"{stage}: loss or gradient norm is not finite at step {step}; the weights were "
                "not changed from there on. Lower optim.lr, set optim.clip_norm, or use "
                "precision=float32; then rerun the stage, it continues from its last checkpoint. "
                f"Configuration: {canonical_json(config)}"
            )

    def skipped(self) -> tuple[int, int, int]:
        """Steps left out: in all, in a row until now, longest row since `restart`."""
        if self._policy == "stop":
            return 0, 0, 0
        total, row, longest = self._counts.tolist()
        return total, row, longest

    def restart(self) -> None:
        """Begin a new row, after the weights were put back to an earlier state."""
        self._counts[1:] = 0

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"counts": self._counts.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._counts = torch.tensor(state["counts"], device=self._counts.device)


def spike_score(earlier: Sequence[float], loss: float) -> float:
    """How many robust standard deviations a loss lies above the last ones; 0 with too few.

    Median and median absolute deviation, so that earlier spikes do not hide a new one.
    """
    window = earlier[-SPIKE_WINDOW:]
    if len(window) < SPIKE_MIN:
        return 0.0
    middle = statistics.median(window)
    spread = NORMAL_MAD * statistics.median(abs(value - middle) for value in window)
    return (loss - middle) / max(spread, 1e-12 + 1e-6 * abs(middle))
