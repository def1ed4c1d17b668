import math

import pytest
import torch
import torch.nn.functional as F

from drorae.models.experts import depth_groups
from drorae.models.fusion import FusionConfig, build_fusion, token_angles_deg
from drorae.models.fusion_variants import cap_per_image

EPS = 1e-6


def make_hidden(layers=6, seed=0, batch=3):
    return torch.randn(
        batch, layers, 16, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def make_fusion(layers=6, seed=0, spread=0.5, **fields):
    config = FusionConfig(**{"expert_hidden": 64, **fields})
    fusion = build_fusion(config, layers, 32, layer_norm_eps=EPS).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in fusion.parameters():
        parameter.data.add_(
            spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        )
    return fusion


def frobenius(x):
    return x.square().sum(dim=(1, 2)).sqrt()


def test_rae_is_the_normalised_last_layer():
    hidden = make_hidden()
    output = make_fusion(kind="rae")(hidden)
    torch.testing.assert_close(output.latent, F.layer_norm(hidden[:, -1], (32,), eps=EPS))
    assert output.weights is None
    assert output.penalty == 0


def test_mean_of_the_deepest_layers_and_its_spatial_mean():
    hidden = make_hidden()
    features = F.layer_norm(hidden, (32,), eps=EPS)
    plain = make_fusion(kind="mean_last_k", deepest_layers=3)(hidden).latent
    torch.testing.assert_close(plain, features[:, 3:].mean(1))
    shifted = make_fusion(kind="mean_last_k", deepest_layers=3, add_spatial_mean=True)(hidden)
    torch.testing.assert_close(shifted.latent, plain + features[:, -1].mean(1, keepdim=True))
    one = make_fusion(kind="mean_last_k", deepest_layers=1)(hidden)
    torch.testing.assert_close(one.latent, one.base)


@pytest.mark.parametrize("seed", range(4))
def test_hirae_residuals_stay_within_their_caps_for_every_image(seed):
    fusion = make_fusion(kind="hirae", router_scope="deepest", seed=seed).train()
    hidden = make_hidden(seed=seed)
    torch.manual_seed(seed)
    features = F.layer_norm(hidden, (32,), eps=EPS)
    base, experts = features[:, -1], fusion.experts(features)
    weights = fusion.eval()(hidden).weights
    total = torch.zeros_like(base)
    for training in (True, False):
        fusion.train(training)
        for group, cap in enumerate((0.025, 0.075, 0.15)):
            layers = fusion.groups[group]
            mixed = torch.einsum("bnl,blnc->bnc", weights[..., layers], experts[:, layers])
            residual = fusion._residual(group, mixed, base)
            assert (frobenius(residual) <= cap * frobenius(base) * (1 + 1e-12)).all()
            total = total + residual * (not training)
    assert (frobenius(total) <= 0.25 * frobenius(base) * (1 + 1e-12)).all()


def test_hirae_agrees_with_its_formula():
    fusion = make_fusion(kind="hirae", router_scope="deepest").eval()
    hidden = make_hidden()
    features = F.layer_norm(hidden, (32,), eps=EPS)
    base, experts = features[:, -1], fusion.experts(features)
    raw = fusion.router.linear(base)
    weights = raw / raw.square().sum(-1, keepdim=True).sqrt()
    latent = base.clone()
    for layers, cap in (((0, 1), 0.025), ((2, 3), 0.075), ((4, 5), 0.15)):
        residual = sum(weights[..., k, None] * experts[:, k] for k in layers)
        scale = (cap * frobenius(base) / frobenius(residual)).clamp(max=1)
        latent = latent + residual * scale[:, None, None]
    torch.testing.assert_close(fusion(hidden).latent, F.layer_norm(latent, (32,), eps=EPS))


def test_hirae_drops_elements_in_training_only():
    fusion = make_fusion(kind="hirae", spread=0.1)
    hidden = make_hidden()
    torch.manual_seed(0)
    assert not torch.equal(fusion(hidden).latent, fusion(hidden).latent)
    fusion.eval()
    assert torch.equal(fusion(hidden).latent, fusion(hidden).latent)


def test_hirae_without_room_is_rae():
    fusion = make_fusion(kind="hirae", group_caps=(0.0, 0.0), group_dropout=(0.0, 0.0)).eval()
    output = fusion(make_hidden())
    torch.testing.assert_close(output.latent, output.base, rtol=2 * EPS, atol=1e-9)


def test_a_residual_below_its_cap_is_left_alone():
    base = torch.ones(1, 4, 8)
    small = 0.01 * torch.ones(1, 4, 8)
    assert torch.equal(cap_per_image(small, base, 0.1), small)
    zero = torch.zeros(1, 4, 8, requires_grad=True)
    cap_per_image(zero, base, 0.1).sum().backward()
    assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize("budget", [(14.4775,), (3.0, 5.0, 9.0), (0.0,)])
def test_an_angle_budget_bounds_the_turn_and_keeps_the_sphere(budget):
    fusion = make_fusion(kind="angle_budget", angle_budget_deg=budget)
    output = fusion(make_hidden())
    angles = token_angles_deg(output.latent, output.base)
    assert angles.max() <= sum(budget) + 1e-9
    torch.testing.assert_close(
        output.latent.norm(dim=-1), output.base.norm(dim=-1), rtol=1e-9, atol=0
    )
    assert output.latent.mean(-1).abs().max() < 1e-9
    if budget == (0.0,):
        torch.testing.assert_close(output.latent, output.base)


def test_the_turn_is_the_budget_times_the_open_gate():
    fusion = make_fusion(kind="angle_budget", angle_budget_deg=(10.0,))
    with torch.no_grad():
        fusion.gate.weight.zero_()
        fusion.gate.bias.fill_(math.log(3.0))  # sigmoid = 0.75
    output = fusion(make_hidden())
    angles = token_angles_deg(output.latent, output.base)
    torch.testing.assert_close(angles, torch.full_like(angles, 7.5), rtol=1e-5, atol=0)


def test_depth_groups_are_contiguous_and_cover_all_layers():
    assert depth_groups(24, 3) == [slice(0, 8), slice(8, 16), slice(16, 24)]
    for layers in range(3, 30):
        groups = depth_groups(layers, 3)
        assert [k for g in groups for k in range(layers)[g]] == list(range(layers))
        sizes = [g.stop - g.start for g in groups]
        assert max(sizes) - min(sizes) <= 1
    with pytest.raises(ValueError, match="at least 3 layers"):
        depth_groups(2, 3)


def test_angles_are_accurate_where_acos_is_not():
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    tiny = math.radians(1e-5)
    b = torch.tensor([math.cos(tiny), math.sin(tiny)], dtype=torch.float64)
    assert token_angles_deg(a, b).item() == pytest.approx(1e-5, rel=1e-6)
    assert token_angles_deg(a, -a).item() == pytest.approx(180.0)
