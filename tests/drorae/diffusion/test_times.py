import pytest
import torch

from drorae.config import from_json, to_json
from drorae.diffusion.noise import uniform
from drorae.diffusion.times import (
    TimeConfig,
    resolve_shift,
    shift_for,
    shift_time,
    time_grid,
    training_times,
    uniform_to_time,
)

ELEMENTS = 768 * 16 * 16
# With shape checks on (--jaxtyping-packages) a wrong type or shape is a TypeError before ours.
REFUSED = (ValueError, TypeError)


def quantiles(config, levels):
    uniform = torch.tensor(levels, dtype=torch.float64)
    return shift_time(uniform_to_time(uniform, config), shift_for(ELEMENTS)).tolist()


def test_shift_of_the_released_latents():
    assert shift_for(ELEMENTS) == pytest.approx(6.9282, abs=1e-4)
    assert shift_for(768 * 32 * 32) == pytest.approx(13.8564, abs=1e-4)
    assert shift_for(4096) == 1.0
    assert shift_for(100) == 1.0


def test_configured_shift_wins_over_the_derived_one():
    assert resolve_shift(TimeConfig(shift=3.0), ELEMENTS) == 3.0
    assert resolve_shift(TimeConfig(base=ELEMENTS), ELEMENTS) == 1.0


def test_shift_equals_its_formula_and_moves_towards_noise():
    draws = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t, share in [(0.0, 0.5), (1.0, 0.5), (0.3, 0.0), *draws.tolist()]:
        shift = 100.0**share
        moved = shift_time(t, shift)
        assert moved == pytest.approx(shift * t / (1 + (shift - 1) * t), rel=1e-12, abs=1e-15)
        assert t - 1e-15 <= moved <= 1


@pytest.mark.parametrize("shift", [1.0, 1.7, 6.928203230275509, 13.856406460551018, 1000.0])
def test_shift_is_monotone_and_keeps_both_ends_exactly(shift):
    t = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    moved = shift_time(t, shift)
    assert (moved.diff() > 0).all()
    assert moved[0] == 0
    assert moved[-1] == 1


def test_shifts_compose():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(shift_time(shift_time(t, 2.0), 3.0), shift_time(t, 6.0))


@pytest.mark.parametrize("shift", [0.5, -1.0, float("nan")])
def test_shift_towards_clean_is_refused(shift):
    with pytest.raises(ValueError, match="at least 1"):
        shift_time(0.5, shift)


def test_logit_normal_quantiles_of_the_reference():
    levels = [0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99]
    expected = [0.403, 0.658, 0.779, 0.874, 0.932, 0.961, 0.986]
    assert quantiles(TimeConfig(), levels) == pytest.approx(expected, abs=6e-4)
    assert quantiles(TimeConfig(distribution="uniform"), [0.5]) == pytest.approx([0.874], abs=6e-4)


def test_law_is_cut_at_its_largest_time():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for config in (TimeConfig(mean=3.0, std=2.0), TimeConfig(distribution="uniform", t_max=0.7)):
        assert uniform_to_time(ends, config).tolist() == pytest.approx([0, config.t_max])
    assert uniform_to_time(ends, TimeConfig(t_max=1.0)).tolist() == [0, 1]


def test_cut_law_is_the_uncut_one_given_that_it_lies_below():
    config = TimeConfig(mean=1.0, t_max=0.6)
    uncut = uniform_to_time(torch.linspace(0, 1, 100_001).double(), TimeConfig(mean=1.0, t_max=1.0))
    kept = uncut[uncut <= 0.6]
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    torch.testing.assert_close(
        uniform_to_time(levels, config), kept.quantile(levels), rtol=1e-3, atol=0
    )


def test_times_have_the_mean_of_the_reference():
    draws = uniform(0, "times", range(50_000), ())
    times = training_times(draws, TimeConfig(), ELEMENTS)
    assert times.dtype == torch.float32
    assert times.mean().item() == pytest.approx(0.837, abs=2e-3)
    assert 0 <= times.min() < times.max() < 1
    flat = TimeConfig(distribution="uniform", shift=shift_for(ELEMENTS))
    assert training_times(draws, flat).mean().item() == pytest.approx(0.787, abs=3e-3)


def test_open_shift_needs_the_latent_size():
    with pytest.raises(ValueError, match="num_elements"):
        training_times(torch.zeros(1), TimeConfig())


@pytest.mark.parametrize(("dim", "end"), [(ELEMENTS, 0.006887), (768 * 32 * 32, 0.013680)])
def test_reference_grid_ends_where_rae_leaves_its_samples(dim, end):
    grid = time_grid(50, shift_for(dim))
    assert grid[0] == 1
    assert grid[-1].item() == pytest.approx(end, abs=1e-6)
    assert (grid.diff() < 0).all()


def test_reference_grid_has_tiny_steps_first():
    grid = time_grid(50, shift_for(ELEMENTS))
    assert grid[1:3].tolist() == pytest.approx([0.9970, 0.9939], abs=6e-5)
    assert grid[-3:].tolist() == pytest.approx([0.2320, 0.1315, 0.0069], abs=6e-5)


def test_zero_grid_ends_clean():
    grid = time_grid(11, 8.0, end="zero")
    assert grid[-1] == 0
    assert grid[-2].item() == pytest.approx(8 * 0.1 / 1.7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: time_grid(1, 1.0), "num_points=1"),
        (lambda: time_grid(2, 1.0, end="clean"), "end"),
        (lambda: shift_for(0), "dim=0"),
        (lambda: TimeConfig(distribution="beta"), "distribution"),
        (lambda: TimeConfig(t_max=0.0), "t_max"),
        (lambda: TimeConfig(std=0.0), "std"),
        (lambda: TimeConfig(base=0), "base"),
        (lambda: TimeConfig(shift=0.5), "shift=0.5"),
    ],
)
def test_values_out_of_range_are_refused(call, message):
    with pytest.raises(REFUSED, match=message):
        call()


def test_json_round_trip():
    config = TimeConfig(distribution="uniform", shift=2.0)
    assert from_json(TimeConfig, to_json(config)) == config
