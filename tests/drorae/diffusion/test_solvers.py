import math

import pytest
import torch

from drorae.diffusion.noise import noise as drawn_noise
from drorae.diffusion.solvers import euler, euler_maruyama, heun
from drorae.diffusion.times import shift_for, time_grid

SHIFT = shift_for(768 * 16 * 16)


def straight_grid(num_steps):
    return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


def gaussian_velocity(std):
    """Exact velocity when clean latents are N(0, std^2)."""

    def velocity(noisy, t):
        variance = (1 - t) ** 2 * std**2 + t**2
        return noisy * (t - (1 - t) * std**2) / variance

    return velocity


def order_of(solver):
    # d noisy/dt = cos(t) noisy: from 1 at t = 1 to exp(-sin(1)) at t = 0
    exact = math.exp(-math.sin(1))
    errors = [
        (
            solver(
                lambda noisy, t: math.cos(t) * noisy,
                torch.ones(1, dtype=torch.float64),
                straight_grid(steps),
            ).item()
            - exact
        )
        for steps in (64, 128)
    ]
    return math.log2(abs(errors[0] / errors[1]))


def test_euler_converges_with_order_one():
    assert order_of(euler) == pytest.approx(1, abs=0.05)


def test_heun_converges_with_order_two():
    assert order_of(heun) == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("solver", [euler, heun])
def test_constant_velocity_reaches_the_end_of_the_reference_grid(solver):
    grid = time_grid(50, SHIFT)
    noise = torch.zeros(2, 3, dtype=torch.float64)
    sample = solver(lambda noisy, t: torch.ones_like(noisy), noise, grid)
    torch.testing.assert_close(sample, torch.full_like(noise, -0.993113), rtol=0, atol=5e-7)
    assert not noise.any()


@pytest.mark.parametrize(("solver", "evaluations"), [(euler, 49), (heun, 98)])
def test_fifty_points_are_forty_nine_steps(solver, evaluations):
    times, reports = [], []

    def velocity(noisy, t):
        times.append(t)
        return noisy

    grid = time_grid(50, SHIFT)
    solver(
        velocity, torch.ones(1), grid, progress=lambda done, total: reports.append((done, total))
    )
    assert len(times) == evaluations
    assert times[0] == 1.0
    assert reports == [(done, 49) for done in range(1, 50)]


@pytest.mark.parametrize("solver", [euler, heun])
def test_state_keeps_its_type_and_no_graph(solver):
    weight = torch.ones(1, requires_grad=True)
    sample = solver(lambda noisy, t: weight * noisy, torch.ones(2), straight_grid(3))
    assert sample.dtype == torch.float32
    assert not sample.requires_grad


def test_stochastic_solver_without_churn_is_euler():
    velocity, noise, grid = gaussian_velocity(0.5), torch.randn(4).double(), straight_grid(9)
    same = euler_maruyama(velocity, noise, grid, step_noise=lambda i: torch.randn(4), churn=0.0)
    torch.testing.assert_close(same, euler(velocity, noise, grid))


@pytest.mark.parametrize("churn", [0.5, 2.0])
def test_stochastic_solver_keeps_the_marginals_of_the_velocity(churn):
    num_samples, std = 20_000, 0.5
    noise = drawn_noise(0, "noise", [0], (num_samples,))[0].double()
    sample = euler_maruyama(
        gaussian_velocity(std),
        noise,
        straight_grid(400),
        step_noise=lambda step: drawn_noise(0, f"step/{step}", [0], (num_samples,))[0],
        churn=churn,
    )
    assert sample.std().item() == pytest.approx(std, rel=0.02)
    assert abs((sample * noise).mean().item()) < 0.95 * std
    deterministic = euler(gaussian_velocity(std), noise, straight_grid(400))
    assert (sample - deterministic).std() > 0.1


def test_stochastic_solver_asks_noise_for_all_steps_but_the_last():
    asked = []

    def step_noise(step):
        asked.append(step)
        return torch.zeros(1)

    euler_maruyama(lambda noisy, t: noisy, torch.ones(1), straight_grid(4), step_noise=step_noise)
    assert asked == [0, 1, 2]


def test_negative_churn_is_refused():
    with pytest.raises(ValueError, match="churn"):
        euler_maruyama(
            lambda noisy, t: noisy,
            torch.ones(1),
            straight_grid(2),
            step_noise=lambda step: torch.zeros(1),
            churn=-1.0,
        )


@pytest.mark.parametrize(
    "times", [[1.0], [0.0, 1.0], [1.0, 1.0], [1.1, 0.0], [1.0, -0.1], [1.0, float("nan")]]
)
def test_grid_that_does_not_fall_is_refused(times):
    with pytest.raises(ValueError, match="does not fall"):
        euler(lambda noisy, t: noisy, torch.ones(1), torch.tensor(times))
