"""Configuration of the training times, without torch; the maths is in `drorae.diffusion.times`."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["MAX_T", "SHIFT_BASE_ELEMENTS", "TimeConfig", "check_shift"]

SHIFT_BASE_ELEMENTS = 4096  # RAE imagenet256 configuration, time_dist_shift_base
MAX_T = 0.999  # RAE transport: times end here before the shift


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeConfig:
    """Distribution of training times."""

    distribution: Literal["uniform", "logit_normal"] = "logit_normal"
    """Law before the shift: uniform, or the sigmoid of a normal. RAE GPU training: logit_normal."""
    mean: float = 0.0
    """Mean of the normal under the sigmoid. RAE: 0."""
    std: float = 1.0
    """Standard deviation of the normal under the sigmoid. RAE: 1."""
    t_max: float = MAX_T
    """Largest time before the shift; the law is cut off there, not clamped. RAE: 0.999."""
    shift: float | None = None
    """Factor of the shift towards noise, at least 1; none: sqrt(latent elements / `base`)."""
    base: int = SHIFT_BASE_ELEMENTS
    """Latent elements at which there is no shift. RAE: 4096."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.distribution not in ("uniform", "logit_normal"):
            raise ValueError(
                f"distribution={self.distribution!r} is unknown: expected 'uniform' or "
                "'logit_normal'."
            )
        if not 0 < self.t_max <= 1:
            raise ValueError(f"t_max={self.t_max} is out of range: expected 0 < t_max <= 1.")
        if self.std <= 0:
            raise ValueError(f"std={self.std} is out of range: expected more than 0.")
        if self.base < 1:
            raise ValueError(f"base={self.base} is out of range: expected at least 1.")
        if self.shift is not None:
            check_shift(self.shift)


def check_shift(shift: float) -> None:
    """Refuse a shift towards clean.

    Raises:
        ValueError: If the shift is below 1 or no number.
    """
    if not shift >= 1:
        raise ValueError(
            f"shift={shift} is out of range: expected at least 1 (towards noise); use 1 for no "
            "shift."
        )
