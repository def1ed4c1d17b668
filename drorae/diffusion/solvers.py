"""Integrate from noise to clean along a falling time grid: Euler, Heun, and a matching SDE.

A solver sees a velocity as a function of (noisy, t) with t a plain float, so that guidance can
decide without a device synchronisation whether it applies. Only the current state is kept. n grid
points are n - 1 steps.
Source: RAE sampler (Euler, 50 points); arXiv:2401.08740 (SiT) for the SDE with the velocity's
marginals.
"""

from collections.abc import Callable
from itertools import pairwise

import torch

from drorae.shapes import Float, Tensor

__all__ = ["Progress", "StepNoise", "VelocityFn", "euler", "euler_maruyama", "heun"]

VelocityFn = Callable[[Tensor, float], Tensor]
"""Velocity at (noisy, t), of the shape of noisy."""

Progress = Callable[[int, int], None]
"""Called after each step with (steps done, steps in all)."""

StepNoise = Callable[[int], Tensor]
"""Standard normal noise of a step, of the shape of the state; see `drorae.diffusion.noise`."""


@torch.no_grad()
def euler(
    velocity: VelocityFn,
    noise: Float[Tensor, "batch ..."],
    grid: Float[Tensor, " points"],
    *,
    progress: Progress | None = None,
) -> Float[Tensor, "batch ..."]:
    """First-order solution at the last grid time; one evaluation a step.

    Args:
        velocity: Field to follow.
        noise: State at the first grid time.
        grid: Falling times, from `drorae.diffusion.times.time_grid`.
        progress: Called after each step.

    Raises:
        ValueError: If the grid does not fall within [0, 1].
    """
    noisy = noise
    steps = _steps(grid)
    for index, (t, next_t) in enumerate(steps):
        noisy = noisy + (next_t - t) * velocity(noisy, t)
        _report(progress, index, steps)
    return noisy


@torch.no_grad()
def heun(
    velocity: VelocityFn,
    noise: Float[Tensor, "batch ..."],
    grid: Float[Tensor, " points"],
    *,
    progress: Progress | None = None,
) -> Float[Tensor, "batch ..."]:
    """Second-order solution at the last grid time; two evaluations a step.

    The last evaluation is at the last time.

    Args:
        velocity: Field to follow.
        noise: State at the first grid time.
        grid: Falling times.
        progress: Called after each step.

    Raises:
        ValueError: If the grid does not fall within [0, 1].
    """
    noisy = noise
    steps = _steps(grid)
    for index, (t, next_t) in enumerate(steps):
        slope = velocity(noisy, t)
        end_slope = velocity(noisy + (next_t - t) * slope, next_t)
        noisy = noisy + (next_t - t) * 0.5 * (slope + end_slope)
        _report(progress, index, steps)
    return noisy


@torch.no_grad()
def euler_maruyama(
    velocity: VelocityFn,
    noise: Float[Tensor, "batch ..."],
    grid: Float[Tensor, " points"],
    *,
    step_noise: StepNoise,
    churn: float = 1.0,
    progress: Progress | None = None,
) -> Float[Tensor, "batch ..."]:
    """Stochastic solution with the marginals of the deterministic one; one evaluation a step.

    Backwards in time, d noisy = (velocity - w/2 * score) dt + sqrt(w) dW with w = churn * t. The
    score comes from the same
    evaluation: -(noisy + (1 - t) velocity) / t, so w * score stays finite at t = 0. The last step
    adds no noise, which would stay in the sample. churn = 0 is Euler.

    Args:
        velocity: Field to follow.
        noise: State at the first grid time.
        grid: Falling times; the last may be 0.
        step_noise: Noise of each step but the last, by step number.
        churn: How much noise is replaced on the way, 0 or more.
        progress: Called after each step.

    Raises:
        ValueError: If the grid does not fall within [0, 1], or churn is negative.
    """
    if not churn >= 0:
        raise ValueError(f"churn={churn} is out of range: expected 0 or more.")
    noisy = noise
    steps = _steps(grid)
    for index, (t, next_t) in enumerate(steps):
        slope = velocity(noisy, t)
        length = t - next_t
        if index == len(steps) - 1:
            noisy = noisy - length * slope
        else:
            predicted_noise = noisy + (1 - t) * slope
            noisy = noisy - length * slope - 0.5 * churn * length * predicted_noise
            noisy = noisy + (churn * t * length) ** 0.5 * step_noise(index).to(noisy)
        _report(progress, index, steps)
    return noisy


def _steps(grid: Tensor) -> list[tuple[float, float]]:
    times = [float(time) for time in grid.cpu()]
    falls = all(late < early for early, late in pairwise(times))
    if len(times) < 2 or not falls or times[0] > 1 or times[-1] < 0:
        raise ValueError(
            f"The time grid {times[:3]}..{times[-1:]} does not fall within [0, 1]: expected at "
            "least two times from 1 "
            "(noise) down to 0 (clean); use drorae.diffusion.times.time_grid."
        )
    return list(pairwise(times))


def _report(progress: Progress | None, index: int, steps: list[tuple[float, float]]) -> None:
    if progress is not None:
        progress(index + 1, len(steps))
