"""When in [0, 1] to train and where to step: time distributions, the shift, sampling grids.

Many latent dimensions carry much redundant signal, so a given t leaves more of it visible; the
shift moves times towards noise (t = 1) by sqrt(dim / 4096) to make up for it. Everything is
computed in float64 and rounded once.
Source: RAE transport; arXiv:2403.03206 (shift, logit-normal).
"""

import math
from typing import Literal, TypeVar, cast

import torch

from drorae.diffusion.time_config import MAX_T, SHIFT_BASE_ELEMENTS, TimeConfig, check_shift
from drorae.shapes import Float, Tensor

__all__ = ["TimeConfig", "resolve_shift", "shift_for", "shift_time", "time_grid", "training_times"]

TimeOrTensor = TypeVar("TimeOrTensor", float, Tensor)


def shift_for(dim: int, base: int = SHIFT_BASE_ELEMENTS) -> float:
    """Shift of a latent with `dim` elements: sqrt(dim / base), and never below 1.

    6.9282 for 768 x 16 x 16, 13.8564 for 768 x 32 x 32.

    Args:
        dim: Elements of one latent, channels * height * width.
        base: Elements at which the shift is 1.

    Raises:
        ValueError: If a count is below 1.
    """
    if dim < 1 or base < 1:
        raise ValueError(f"dim={dim}, base={base} is out of range: expected both at least 1.")
    return max(1.0, math.sqrt(dim / base))


def resolve_shift(config: TimeConfig, num_elements: int) -> float:
    """The configured shift, or the one that follows from the elements of one latent."""
    return config.shift if config.shift is not None else shift_for(num_elements, config.base)


def shift_time(t: TimeOrTensor, shift: float) -> TimeOrTensor:
    """Move times towards noise: shift * t / (1 + (shift - 1) * t).

    Written so that 0 and 1 stay exactly where they are, also after rounding.

    Args:
        t: Times in [0, 1].
        shift: Factor of at least 1; 1 changes nothing.

    Raises:
        ValueError: If the shift is below 1.
    """
    check_shift(shift)
    return t / (t + (1 - t) / shift)


def training_times(
    uniform: Float[Tensor, " batch"], config: TimeConfig, num_elements: int | None = None
) -> Float[Tensor, " batch"]:
    """Shifted training times, float32, one for each uniform number in [0, 1).

    The logit-normal law is cut at `t_max` by its inverse distribution function, so one uniform
    number makes one time.

    Args:
        uniform: From `drorae.diffusion.noise.uniform`, on any device.
        config: Law and shift.
        num_elements: Elements of one latent; needed when the configuration leaves the shift open.

    Raises:
        ValueError: If the shift is open and `num_elements` is not given.
    """
    if config.shift is None and num_elements is None:
        raise ValueError(
            "The time shift is open (shift=None): expected num_elements, the elements of one "
            "latent; pass it or set shift."
        )
    t = uniform_to_time(uniform.double(), config)
    return shift_time(t, resolve_shift(config, num_elements or 1)).float()


def uniform_to_time(
    uniform: Float[Tensor, " batch"], config: TimeConfig
) -> Float[Tensor, " batch"]:
    """Inverse distribution function of the law before the shift, from [0, 1] to [0, t_max]."""
    if config.distribution == "uniform":
        return uniform * config.t_max
    cut = 1.0
    if config.t_max < 1:
        logit = math.log(config.t_max / (1 - config.t_max))
        cut = 0.5 * (1 + math.erf((logit - config.mean) / (config.std * math.sqrt(2))))
    # torch's stubs leave ndtri without a type.
    inverse = torch.special.ndtri  # pyright: ignore[reportUnknownMemberType,reportUnknownVariableType]
    normal = cast(Tensor, inverse(uniform * cut))
    return torch.sigmoid(config.mean + config.std * normal)


def time_grid(
    num_points: int, shift: float, end: Literal["reference", "zero"] = "reference"
) -> Float[Tensor, " points"]:
    """Falling times from 1, dense near noise, for a solver; float64 on the CPU.

    n points make n - 1 steps.

    Args:
        num_points: Points with both ends; at least 2.
        shift: Factor of the shift, see `shift_for`.
        end: `reference` stops at t = 0.001 before the shift (0.0069 after it at 256 px), where RAE
            leaves its samples; `zero` goes to clean (RAEv2).

    Raises:
        ValueError: Fewer than two points, a shift below 1, or an unknown end.
    """
    if num_points < 2:
        raise ValueError(f"num_points={num_points} makes no step: expected at least 2.")
    if end not in ("reference", "zero"):
        raise ValueError(f"end={end!r} is unknown: expected 'reference' or 'zero'.")
    last = MAX_T if end == "reference" else 1.0
    # Fractions first: linspace then rounds its last point to exactly `last`.
    covered = torch.linspace(0.0, last, num_points, dtype=torch.float64)
    return shift_time(1 - covered, shift)
