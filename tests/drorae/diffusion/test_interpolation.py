import pytest
import torch

from drorae.diffusion.interpolation import (
    MIN_DENOMINATOR_T,
    add_noise,
    clean_to_velocity,
    noise_to_velocity,
    velocity_loss,
    velocity_target,
    velocity_to_clean,
    velocity_to_noise,
    velocity_to_score,
)

# With shape checks on (--jaxtyping-packages) a wrong type or shape is a TypeError before ours.
REFUSED = (ValueError, TypeError)


@pytest.fixture
def path():
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([1e-3, 0.2, 0.5, 0.9, 0.999], dtype=torch.float64)
    return clean, noise, t, add_noise(clean, noise, t)


def test_the_path_starts_clean_and_ends_in_noise(path):
    clean, noise, _, _ = path
    torch.testing.assert_close(add_noise(clean, noise, torch.zeros(5)), clean, rtol=0, atol=0)
    torch.testing.assert_close(add_noise(clean, noise, torch.ones(5)), noise, rtol=0, atol=0)


def test_velocity_is_the_derivative_of_the_path(path):
    clean, noise, t, noisy = path
    slope = (add_noise(clean, noise, t + 1e-6) - noisy) / 1e-6
    torch.testing.assert_close(slope, velocity_target(clean, noise), rtol=1e-6, atol=1e-6)


def test_true_velocity_gives_back_clean_noise_and_score(path):
    clean, noise, t, noisy = path
    velocity = velocity_target(clean, noise)
    torch.testing.assert_close(velocity_to_clean(velocity, noisy, t), clean)
    torch.testing.assert_close(velocity_to_noise(velocity, noisy, t), noise)
    score = velocity_to_score(velocity, noisy, t)
    torch.testing.assert_close(score, -noise / t.view(-1, 1, 1, 1))


def test_predictions_convert_back_and_forth(path):
    _, _, t, noisy = path
    velocity = torch.randn_like(noisy)
    clean = velocity_to_clean(velocity, noisy, t)
    noise = velocity_to_noise(velocity, noisy, t)
    torch.testing.assert_close(clean_to_velocity(clean, noisy, t, min_t=0.0), velocity)
    back = noise_to_velocity(noise, noisy, t, min_remaining=0.0)
    torch.testing.assert_close(back, velocity)
    torch.testing.assert_close(add_noise(clean, noise, t), noisy)


def test_divisor_is_bounded_near_clean(path):
    clean, noise, t, noisy = path
    velocity = clean_to_velocity(clean, noisy, t)
    target = velocity_target(clean, noise)
    torch.testing.assert_close(velocity[1:], target[1:])
    torch.testing.assert_close(velocity[0], target[0] * 1e-3 / MIN_DENOMINATOR_T)


def test_divisor_is_bounded_near_noise(path):
    clean, noise, t, noisy = path
    velocity = noise_to_velocity(noise, noisy, t)
    target = velocity_target(clean, noise)
    torch.testing.assert_close(velocity[:4], target[:4])
    torch.testing.assert_close(velocity[4], target[4] * 1e-3 / MIN_DENOMINATOR_T)


def test_loss_is_the_mean_squared_error_of_each_sample(path):
    clean, noise, _, _ = path
    offset = torch.arange(5, dtype=torch.float64)
    velocity = velocity_target(clean, noise) + offset.view(-1, 1, 1, 1)
    torch.testing.assert_close(velocity_loss(velocity, clean, noise), offset**2)


def test_loss_of_a_half_precision_prediction_is_float32():
    ones = torch.ones(2, 3, 2, 2)
    loss = velocity_loss(ones.bfloat16(), torch.zeros(2, 3, 2, 2), ones)
    assert loss.dtype == torch.float32
    assert not loss.any()


def test_shapes_that_differ_are_refused(path):
    clean, noise, t, _ = path
    with pytest.raises(REFUSED, match=r"expected equal shapes|noise"):
        add_noise(clean, noise[:1], t)
    with pytest.raises(REFUSED, match=r"one time for each of 5|batch"):
        add_noise(clean, noise, t[:1])
