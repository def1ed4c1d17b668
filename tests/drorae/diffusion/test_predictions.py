from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drorae.diffusion.guidance import GuidanceConfig, guided_velocity_fn
from drorae.diffusion.interpolation import add_noise, velocity_loss, velocity_to_clean
from drorae.diffusion.predictions import as_velocity_model, to_velocity
from drorae.diffusion.solvers import euler
from drorae.diffusion.times import time_grid

LABELS = torch.tensor([0, 1, 2, 3])


def draw(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64)


CLEAN, NOISE, FULL, BASE = (draw(seed) for seed in range(4))
TIMES = torch.tensor([0.05, 0.3, 0.7, 1.0], dtype=torch.float64)


def with_base(full: Tensor, base: Tensor) -> Callable[..., Any]:
    """A network of constant outputs with a base head."""

    def model(noisy: Tensor, t: Tensor, labels: Tensor, with_base: bool = False) -> Any:
        return (full, base) if with_base else full

    return model


def internal(scale: float) -> GuidanceConfig:
    return GuidanceConfig(kind="internal", scale=scale, t_min=0.1)


def test_a_perfect_clean_prediction_gives_the_exact_velocity() -> None:
    noisy = add_noise(CLEAN, NOISE, TIMES)
    velocity = to_velocity(CLEAN, noisy, TIMES, "clean")
    torch.testing.assert_close(velocity, NOISE - CLEAN, rtol=0, atol=1e-13)
    assert velocity_loss(velocity, CLEAN, NOISE).max() < 1e-26
    assert torch.equal(to_velocity(velocity, noisy, TIMES, "velocity"), velocity)


def test_the_floor_bounds_the_velocity_near_clean() -> None:
    t = torch.full((4,), 0.01, dtype=torch.float64)
    velocity = to_velocity(CLEAN, add_noise(CLEAN, NOISE, t), t, "clean")
    torch.testing.assert_close(velocity, (NOISE - CLEAN) * 0.01 / 0.05)


def test_a_clean_predictor_is_sampled_to_its_prediction() -> None:
    model = as_velocity_model(lambda noisy, t, labels: CLEAN, "clean")
    velocity = guided_velocity_fn(GuidanceConfig(), model, LABELS)
    grid = time_grid(9, 1.0, "zero")[:-1]  # 1 down to 1/8, above the floor
    found = euler(velocity, NOISE, grid)
    expected = add_noise(CLEAN, NOISE, torch.full((4,), 0.125, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("prediction", ["velocity", "clean"])
def test_internal_guidance_at_scale_1_is_the_full_prediction(prediction: Any) -> None:
    model = as_velocity_model(with_base(FULL, BASE), prediction)
    velocity = guided_velocity_fn(internal(1.0), model, LABELS)(NOISE, 0.5)
    half = torch.full((4,), 0.5, dtype=torch.float64)
    assert torch.equal(velocity, to_velocity(FULL, NOISE, half, prediction))


def test_internal_guidance_of_velocities_is_that_of_clean_predictions() -> None:
    model = as_velocity_model(with_base(FULL, BASE), "clean")
    velocity = guided_velocity_fn(internal(1.78), model, LABELS)(NOISE, 0.5)
    half = torch.full((4,), 0.5, dtype=torch.float64)
    clean = velocity_to_clean(velocity, NOISE, half)
    torch.testing.assert_close(clean, FULL + 0.78 * (FULL - BASE))
    plain = guided_velocity_fn(internal(1.78), model, LABELS)(NOISE, 0.09)  # outside the interval
    torch.testing.assert_close(plain, (NOISE - FULL) / 0.09)


def test_what_is_unknown_or_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 'velocity' or 'clean'"):
        to_velocity(FULL, NOISE, TIMES, "noise")  # pyright: ignore[reportArgumentType]
    with pytest.raises(RuntimeError, match="eval mode"):
        as_velocity_model(nn.Linear(1, 1), "clean")
