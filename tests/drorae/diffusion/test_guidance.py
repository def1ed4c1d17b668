import pytest
import torch
from torch import nn

from drorae.config import from_json, to_json
from drorae.diffusion.guidance import (
    GuidanceConfig,
    autoguidance_velocity_fn,
    cfg_velocity_fn,
    conditional_velocity_fn,
    guided_velocity_fn,
    internal_guidance_velocity_fn,
    is_guided,
)
from drorae.diffusion.solvers import euler
from drorae.diffusion.times import shift_for, time_grid

NULL = 9
LABELS = torch.tensor([0, 1, 2])
# With shape checks on (--jaxtyping-packages) a wrong type or shape is a TypeError before ours.
REFUSED = (ValueError, TypeError)


class LabelField:
    """Velocity = strength * (label + t) * noisy; remembers the size of each batch."""

    def __init__(self, strength=1.0):
        self.strength = strength
        self.batches = []

    def __call__(self, noisy, t, labels, with_base=False):
        self.batches.append(len(noisy))
        velocity = self.strength * (labels + t).view(-1, 1) * noisy
        return (velocity, 0.5 * velocity) if with_base else velocity


class Module(nn.Module):
    def forward(self, noisy, t, labels):
        return noisy


@pytest.fixture
def noisy():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def scaled(labels, t, noisy):
    return (torch.as_tensor(labels, dtype=torch.float64) + t).view(-1, 1) * noisy


def test_cfg_pushes_away_from_no_class(noisy):
    velocity = cfg_velocity_fn(LabelField(), LABELS, null_label=NULL, scale=3.0)(noisy, 0.5)
    weak, strong = scaled([NULL] * 3, 0.5, noisy), scaled([0, 1, 2], 0.5, noisy)
    torch.testing.assert_close(velocity, weak + 3 * (strong - weak))


def test_autoguidance_pushes_away_from_the_weak_model(noisy):
    fn = autoguidance_velocity_fn(LabelField(), LabelField(0.5), LABELS, scale=1.5)
    strong = scaled([0, 1, 2], 0.5, noisy)
    torch.testing.assert_close(fn(noisy, 0.5), 0.5 * strong + 1.5 * 0.5 * strong)


def test_internal_guidance_pushes_away_from_the_base_head_in_one_evaluation(noisy):
    model = LabelField()
    fn = internal_guidance_velocity_fn(model, LABELS, scale=1.78)
    strong = scaled([0, 1, 2], 0.5, noisy)
    torch.testing.assert_close(fn(noisy, 0.5), 0.5 * strong + 1.78 * 0.5 * strong)
    assert model.batches == [3]


@pytest.mark.parametrize("kind", ["cfg", "autoguidance", "internal"])
@pytest.mark.parametrize("scale", [0.0, 0.7, 1.0])
def test_scale_of_at_most_one_is_the_plain_velocity_at_the_plain_cost(kind, scale, noisy):
    model, weak = LabelField(), LabelField(0.5)
    config = GuidanceConfig(kind=kind, scale=scale)
    fn = guided_velocity_fn(config, model, LABELS, null_label=NULL, weak_model=weak)
    expected = conditional_velocity_fn(LabelField(), LABELS)(noisy, 0.3)
    torch.testing.assert_close(fn(noisy, 0.3), expected, rtol=0, atol=0)
    assert model.batches == [3]
    assert weak.batches == []


def test_guidance_tends_to_the_plain_velocity_at_scale_one(noisy):
    plain = scaled([0, 1, 2], 0.5, noisy)
    fn = cfg_velocity_fn(LabelField(), LABELS, null_label=NULL, scale=1 + 1e-12)
    torch.testing.assert_close(fn(noisy, 0.5), plain, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("t", "batch"), [(0.2, 6), (0.7, 6), (0.19999, 3), (0.70001, 3)])
def test_interval_includes_both_ends_and_costs_nothing_outside(t, batch, noisy):
    model = LabelField()
    fn = cfg_velocity_fn(model, LABELS, null_label=NULL, scale=2.0, interval=(0.2, 0.7))
    fn(noisy, t)
    assert model.batches == [batch]


def test_weak_model_rests_outside_the_interval(noisy):
    weak = LabelField()
    fn = autoguidance_velocity_fn(LabelField(), weak, LABELS, scale=2.0, interval=(0.5, 1.0))
    fn(noisy, 0.4)
    assert weak.batches == []


def test_full_interval_guides_every_step_of_the_shifted_grid(noisy):
    model = LabelField()
    fn = cfg_velocity_fn(model, LABELS, null_label=NULL, scale=1.5)
    euler(fn, noisy, time_grid(50, shift_for(196_608)))
    assert model.batches == [6] * 49


def test_with_shift_eight_only_the_last_rae_v2_step_is_unguided():
    grid = time_grid(101, 8.0, end="zero").tolist()
    guided = [is_guided(t, 1.78, (0.1, 1.0)) for t in grid[:-1]]
    assert guided == [True] * 99 + [False]


def test_times_reach_the_model_in_at_least_float32():
    seen = []

    def model(noisy, t, labels):
        seen.append(t)
        return noisy

    conditional_velocity_fn(model, LABELS)(torch.zeros(3, 4, dtype=torch.bfloat16), 0.997)
    assert seen[0].dtype == torch.float32
    assert seen[0].shape == (3,)


def test_no_guidance_is_the_conditional_velocity(noisy):
    fn = guided_velocity_fn(GuidanceConfig(), LabelField(), LABELS)
    torch.testing.assert_close(fn(noisy, 0.5), scaled([0, 1, 2], 0.5, noisy))


def test_network_in_training_mode_is_refused():
    with pytest.raises(RuntimeError, match=r"model\.eval"):
        conditional_velocity_fn(Module(), LABELS)
    assert conditional_velocity_fn(Module().eval(), LABELS)(torch.ones(3, 1), 0.5).sum() == 3


@pytest.mark.parametrize(
    ("kind", "message"), [("cfg", "null_label"), ("autoguidance", "weak_model")]
)
def test_what_a_kind_needs_must_be_given(kind, message):
    with pytest.raises(ValueError, match=message):
        guided_velocity_fn(GuidanceConfig(kind=kind, scale=2.0), LabelField(), LABELS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "strong"}, "kind"),
        ({"scale": -1.0}, "scale"),
        ({"scale": float("inf")}, "scale"),
        ({"t_min": 0.6, "t_max": 0.5}, "interval"),
        ({"t_max": 1.5}, "interval"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(REFUSED, match=message):
        GuidanceConfig(**changes)


def test_json_round_trip():
    config = GuidanceConfig(kind="cfg", scale=1.5, t_min=0.1)
    assert from_json(GuidanceConfig, to_json(config)) == config
