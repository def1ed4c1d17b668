import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from drorae.config import from_json, to_json
from drorae.models.fusion import (
    FusionConfig,
    build_fusion,
    parameter_counts,
    token_angles_deg,
)

EPS = 1e-6
# arXiv:2605.10780 as printed, in millions: Table 8 by hidden width (12 layers).
TABLE_8 = {
    128: 2.5,
    256: 4.8,
    512: 9.6,
    1024: 19.0,
    2048: 37.8,
    3072: 56.7,
    4096: 75.6,
    6144: 113.3,
}


def make_hidden(layers=4, tokens=16, dim=32, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-0.5, 1, layers).view(1, layers, 1, 1)  # raw scales differ by layer
    return torch.randn(batch, layers, tokens, dim, generator=generator) * scale + 0.1


def make_fusion(layers=4, dim=32, seed=1, **fields):
    torch.manual_seed(seed)
    config = FusionConfig(**{"expert_hidden": 2 * dim, **fields})
    return build_fusion(config, layers, dim, layer_norm_eps=EPS)


def shuffle_parameters(fusion, seed=2):
    """Every parameter random, so that no property is true by initialisation alone."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in fusion.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.data.add_(0.5 * noise)
    return fusion


def test_equations_agree_with_a_loop_over_layers():
    fusion = shuffle_parameters(make_fusion()).double().eval()
    hidden = make_hidden().double()
    output = fusion(hidden)
    experts, router = fusion.experts, fusion.router.linear

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + EPS).sqrt()

    outputs = []
    for k in range(4):
        x = norm(hidden[:, k]) @ experts.up_weight[k] + experts.up_bias[k]
        x = F.layer_norm(x, (64,), experts.norm_weight[k, 0], experts.norm_bias[k, 0], 1e-5)
        outputs.append(norm(F.gelu(x) @ experts.down_weight[k] + experts.down_bias[k]))
    seen = torch.cat([norm(hidden[:, k]) for k in range(4)], dim=-1)
    raw = seen @ router.weight.T + router.bias
    total = sum(raw[..., k : k + 1] * outputs[k] for k in range(4))
    fused = norm(total / (raw.square().sum(-1, keepdim=True) + 1e-6).sqrt())
    base = norm(hidden[:, -1])
    torch.testing.assert_close(output.fused, fused)
    torch.testing.assert_close(output.latent, norm(base + 0.2 * (fused - base)))
    torch.testing.assert_close(output.base, base)


def test_beta_zero_is_rae_to_rounding():
    fusion = shuffle_parameters(make_fusion(beta=0.0)).double()
    hidden = make_hidden().double()
    rae = make_fusion(kind="rae")(hidden).latent
    # LayerNorm of a normalised token divides by sqrt(1 + eps): half of eps, relative.
    torch.testing.assert_close(fusion(hidden).latent, rae, rtol=2 * EPS, atol=1e-9)


def test_dividing_by_the_energy_changes_nothing_because_of_the_norm_behind_it():
    fusion = shuffle_parameters(make_fusion(energy_eps=0.0)).double()
    hidden = make_hidden().double()
    output = fusion(hidden)
    experts = fusion.experts(F.layer_norm(hidden, (32,), eps=EPS))
    for scale in (1e-1, 1.0, 37.0):
        mixed = scale * torch.einsum("bnl,blnc->bnc", output.weights, experts)
        again = F.layer_norm(mixed, (32,), eps=1e-30)
        angle = token_angles_deg(again, output.fused)
        assert angle.max() < 1e-5


def test_scaling_the_router_changes_no_latent():
    fusion = shuffle_parameters(make_fusion(energy_eps=0.0)).double()
    hidden = make_hidden().double()
    before = fusion(hidden)
    with torch.no_grad():
        fusion.router.linear.weight.mul_(9.0)
        fusion.router.linear.bias.mul_(9.0)
    after = fusion(hidden)
    torch.testing.assert_close(after.latent, before.latent, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(after.router_norm, 9.0 * before.router_norm)


@pytest.mark.parametrize("beta", [0.05, 0.2, 0.3, 0.45])
def test_no_token_turns_further_than_beta_allows(beta):
    limit = math.degrees(math.asin(beta / (1 - beta)))
    largest = 0.0
    for seed in range(5):
        fusion = shuffle_parameters(make_fusion(beta=beta), seed).double()
        output = fusion(make_hidden(seed=seed).double())
        largest = max(largest, token_angles_deg(output.latent, output.base).max().item())
    assert largest <= limit * (1 + 1e-6)
    assert largest > 0.8 * limit


def test_the_largest_turn_is_at_cosine_minus_beta_over_one_minus_beta():
    base = torch.tensor([1.0, 0.0], dtype=torch.float64)
    angles = torch.linspace(0, math.pi, 200001, dtype=torch.float64)
    fused = torch.stack([angles.cos(), angles.sin()], dim=-1)
    turned = token_angles_deg(0.8 * base + 0.2 * fused, base.expand_as(fused))
    assert turned.max().item() == pytest.approx(14.4775, abs=1e-4)
    assert fused[turned.argmax(), 0].item() == pytest.approx(-0.25, abs=1e-3)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"activation": "none", "expert_hidden": 32},
        {"router_input": "raw"},
        {"aggregation": "softmax"},
        {"aggregation": "cross_attention"},
        {"kind": "angle_budget"},
        {"kind": "hirae", "router_scope": "deepest"},
    ],
)
def test_at_the_start_the_latent_is_close_to_rae(fields):
    fusion = make_fusion(**fields).eval()
    output = fusion(make_hidden())
    assert token_angles_deg(output.latent, output.base).mean() < 3.0


def test_at_the_start_every_wide_expert_is_the_identity():
    features = F.layer_norm(make_hidden().double(), (32,), eps=EPS)
    for fields in ({}, {"activation": "none"}, {"expert_hidden": 80}):
        experts = make_fusion(**fields).double().experts
        assert token_angles_deg(experts(features), features).max() < 1e-4


def test_at_the_start_a_narrow_expert_is_a_projection_within_the_bound():
    fusion = make_fusion(expert_hidden=16)
    output = fusion(make_hidden())
    assert token_angles_deg(output.latent, output.base).max() < 14.48


def test_weights_are_signed_unit_norm_or_a_distribution():
    hidden, ones = make_hidden().double(), torch.ones(2, 16, dtype=torch.float64)
    energy = shuffle_parameters(make_fusion(energy_eps=0.0)).double()(hidden).weights
    assert (energy < 0).any()
    torch.testing.assert_close(energy.norm(dim=-1), ones)
    for aggregation in ("softmax", "cross_attention"):
        fusion = shuffle_parameters(make_fusion(aggregation=aggregation)).double()
        weights = fusion(hidden).weights
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(-1), ones)


def test_signed_weights_reach_what_a_distribution_cannot():
    fusion, hidden = make_fusion(energy_eps=0.0).double(), make_hidden().double()
    with torch.no_grad():
        fusion.router.linear.weight.zero_()
        fusion.router.linear.bias.copy_(torch.tensor([0.0, 0.0, 0.0, -1.0]))
    experts = fusion.experts(F.layer_norm(hidden, (32,), eps=EPS))
    opposite = token_angles_deg(fusion(hidden).fused, experts[:, -1])
    torch.testing.assert_close(opposite, torch.full_like(opposite, 180.0))
    mean = experts.mean(1)
    softmax = shuffle_parameters(make_fusion(aggregation="softmax")).double()
    own = softmax.experts(F.layer_norm(hidden, (32,), eps=EPS))
    mixed = torch.einsum("bnl,blnc->bnc", softmax(hidden).weights, own)
    # Convex: along any direction no further than the furthest expert.
    along = torch.einsum("blnc,bnc->bln", own, mean)
    reached = (mixed * mean).sum(-1)
    assert (reached <= along.amax(1) + 1e-9).all()
    assert (reached >= along.amin(1) - 1e-9).all()


def test_without_increment_the_latent_is_the_fused_one():
    output = make_fusion(incremental=False)(make_hidden())
    assert output.latent is output.fused


def test_a_subset_of_layers_keeps_the_deepest():
    fusion = shuffle_parameters(make_fusion(deepest_layers=2))
    hidden = make_hidden()
    changed = hidden.clone()
    changed[:, :2] = 0.0
    assert fusion(hidden).weights.shape[-1] == 2
    torch.testing.assert_close(fusion(changed).latent, fusion(hidden).latent, rtol=0, atol=0)
    with pytest.raises(ValueError, match="deepest_layers=5"):
        make_fusion(deepest_layers=5)


def test_every_parameter_receives_a_finite_gradient():
    for fields in ({}, {"kind": "hirae"}, {"kind": "angle_budget"}, {"aggregation": "softmax"}):
        fusion = shuffle_parameters(make_fusion(**fields))
        fusion(make_hidden()).latent.pow(3).sum().backward()
        for name, parameter in fusion.named_parameters():
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["drorae", "hirae", "angle_budget"])
def test_gradients_at_the_start_are_finite_and_moderate(kind):
    fusion = make_fusion(kind=kind)
    fusion(make_hidden()).latent.pow(3).mean().backward()
    norm = torch.stack([p.grad.norm() for p in fusion.parameters()]).norm()
    assert 1e-6 < norm < 10


def test_recomputing_gives_the_same_latents_and_gradients():
    kept = shuffle_parameters(make_fusion())
    again = build_fusion(kept.config, 4, 32, layer_norm_eps=EPS, recompute=True)
    again.load_state_dict(kept.state_dict())
    results = []
    for fusion in (kept, again):
        latent = fusion(make_hidden()).latent
        latent.pow(3).sum().backward()
        results.append((latent.detach(), fusion.experts.up_weight.grad))
    torch.testing.assert_close(results[0], results[1])


def test_router_dropout_acts_in_training_only():
    fusion = make_fusion(router_dropout=0.5)
    hidden = make_hidden()
    torch.manual_seed(0)
    assert (fusion(hidden).weights == 0).any()
    fusion.eval()
    torch.testing.assert_close(fusion(hidden).latent, fusion(hidden).latent, rtol=0, atol=0)
    assert not (fusion(hidden).weights == 0).any()


def test_smoothness_counts_neighbours_in_rows_and_columns():
    hidden = make_hidden()
    assert shuffle_parameters(make_fusion())(hidden).penalty == 0
    output = shuffle_parameters(make_fusion(routing_smoothness=0.1))(hidden)
    layout = output.weights.reshape(2, 4, 4, 4)
    squares = [
        (layout[:, r, c] - layout[:, r + dr, c + dc]).square()
        for r in range(4)
        for c in range(4)
        for dr, dc in ((0, 1), (1, 0))
        if r + dr < 4 and c + dc < 4
    ]
    torch.testing.assert_close(output.penalty, 0.1 * torch.stack(squares).mean())
    assert make_fusion(routing_smoothness=0.1)(make_hidden(tokens=1)).penalty == 0


def count(layers=12, hidden=3072):
    with torch.device("meta"):
        fusion = build_fusion(FusionConfig(expert_hidden=hidden), layers, 768)
    return parameter_counts(fusion)


@pytest.mark.parametrize("hidden", sorted(TABLE_8))
def test_parameters_fit_table_8_to_the_rounding_of_the_paper(hidden):
    counts = count(hidden=hidden)
    formula = 12 * (768 * hidden + hidden + hidden * 768 + 768) + 768 * 144 + 12
    print(  # noqa: T201 - shown with -s: the paper's column beside ours
        f"h={hidden:5d} paper {TABLE_8[hidden]:6.1f}M ours: experts {counts['experts'] / 1e6:.3f} "
        f"hidden norm {counts['hidden_norm'] / 1e6:.3f} router {counts['router'] / 1e6:.3f} "
        f"total {counts['total'] / 1e6:.3f}M"
    )
    assert counts["experts"] + counts["router"] == formula
    assert counts["hidden_norm"] == 24 * hidden
    # The printed column follows no single rule: experts alone, or with router, to one decimal.
    assert abs(counts["experts"] / 1e6 - TABLE_8[hidden]) < 0.15


@pytest.mark.parametrize("layers", range(1, 13))
def test_parameters_by_number_of_layers_follow_the_formula(layers):
    counts = count(layers=layers)
    formula = layers * (768 * 3072 * 2 + 3072 + 768) + 768 * layers**2 + layers
    # The paper counts only the last row of Table 9; the others are its formula.
    paper = "56.7M" if layers == 12 else "   - "
    print(  # noqa: T201 - shown with -s: the paper's column beside ours
        f"deepest {layers:2d}: paper {paper} ours: experts {counts['experts'] / 1e6:.3f} "
        f"hidden norm {counts['hidden_norm'] / 1e6:.3f} router {counts['router'] / 1e6:.3f} "
        f"total {counts['total'] / 1e6:.3f}M, formula {formula / 1e6:.3f}M"
    )
    assert counts["experts"] + counts["router"] == formula
    assert counts["hidden_norm"] == 2 * 3072 * layers
    if layers == 12:
        assert abs(counts["experts"] / 1e6 - 56.7) < 0.05


def test_the_29m_of_the_abstract_is_a_hidden_width_of_1536():
    assert count(hidden=1536)["total"] / 1e6 == pytest.approx(28.45, abs=0.05)


def test_configuration_survives_json_and_rebuilds_the_module():
    config = FusionConfig(kind="hirae", expert_hidden=8, group_caps=(0.1,), group_dropout=(0.0,))
    again = from_json(FusionConfig, to_json(config))
    assert again == config
    state = build_fusion(config, 3, 8).state_dict()
    build_fusion(again, 3, 8).load_state_dict(state, strict=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 1.5}, r"fusion\.beta=1.5"),
        ({"expert_hidden": 1}, "at least 2"),
        ({"deepest_layers": 0}, "at least 1"),
        ({"group_caps": (0.1,)}, "one of each per depth group"),
        ({"group_caps": (), "group_dropout": ()}, "one of each per depth group"),
        ({"angle_budget_deg": ()}, "one angle per depth group"),
        ({"angle_budget_deg": (91.0,)}, "0.0 to 90.0"),
        ({"router_dropout": 1.0}, "router_dropout"),
        ({"kind": "hirae", "aggregation": "softmax"}, "use energy"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        FusionConfig(**fields)


def test_all_kinds_share_the_interface():
    hidden = make_hidden()
    for kind in ("rae", "mean_last_k", "drorae", "hirae", "angle_budget"):
        output = make_fusion(kind=kind).eval()(hidden)
        names = {f.name for f in dataclasses.fields(output)}
        assert names >= {"latent", "base", "fused", "weights", "penalty"}
        assert output.latent.shape == output.base.shape == (2, 16, 32)
