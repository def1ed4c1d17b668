import math

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm, normalize

from drorae.evaluation.diagnostics import (
    angle_histogram,
    angle_report,
    decoding_sensitivity,
    effective_layers,
    radial_spectrum_difference,
    routing_maps,
    routing_report,
)


def test_maps_keep_token_order() -> None:
    weights = torch.arange(2 * 4 * 3).float().reshape(2, 4, 3)
    maps = routing_maps(weights)
    assert maps.shape == (2, 3, 2, 2)
    assert maps[0, 1].flatten().tolist() == weights[0, :, 1].tolist()
    with pytest.raises(ValueError, match="square"):
        routing_maps(torch.zeros(1, 5, 2))


def test_effective_layers_counts_one_and_all() -> None:
    one = torch.tensor([[[0.0, -2.0, 0.0, 0.0]]])
    assert effective_layers(one).item() == pytest.approx(1.0, abs=1e-5)
    assert effective_layers(torch.ones(1, 1, 4)).item() == pytest.approx(4.0, abs=1e-5)


def test_routing_report_is_signed_and_free_of_scale() -> None:
    weights = torch.tensor([1.0, -1.0]).expand(2, 4, 2)
    found = routing_report(3.0 * weights)
    assert found["mean"] == pytest.approx([2**-0.5, -(2**-0.5)])
    assert found["positive_share"] == [1.0, 0.0]
    assert found["total_variation"] == pytest.approx(0.0)
    assert found["raw_norm"] == pytest.approx(3.0 * 2**0.5)


def test_angle_reaches_the_bound_at_the_predicted_cosine() -> None:
    beta, generator = 0.2, torch.Generator().manual_seed(0)
    base = layer_norm(torch.randn(1, 9, 64, generator=generator), (64,))
    other = layer_norm(torch.randn(1, 9, 64, generator=generator), (64,))
    # A unit vector at cosine -beta / (1 - beta) to the base turns the blend the furthest.
    unit = normalize(base, dim=-1)
    across = normalize(other - (other * unit).sum(-1, keepdim=True) * unit, dim=-1)
    cosine = -beta / (1 - beta)
    fused = 8.0 * (cosine * unit + math.sqrt(1 - cosine**2) * across)
    latent = (1 - beta) * base * 8.0 / base.norm(dim=-1, keepdim=True) + beta * fused
    found = angle_report(latent, base, fused, beta)
    assert found["angle_bound_degrees"] == pytest.approx(14.4775, abs=1e-3)
    assert found["angle_mean_degrees"] == pytest.approx(14.4775, abs=1e-2)
    assert found["cosine_fused_base"] == pytest.approx(-0.25, abs=1e-4)
    assert found["cosine_at_bound"] == pytest.approx(-0.25)
    assert found["near_bound_share"] == 1.0


def test_no_bound_from_one_half_on() -> None:
    tokens = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    assert angle_report(tokens, tokens, tokens, 1.0)["angle_bound_degrees"] == 180.0
    assert angle_report(tokens, tokens, tokens, 0.2)["angle_max_degrees"] < 1e-3


def test_blur_shows_as_missing_high_frequencies() -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    found = radial_spectrum_difference(images, blurred)
    assert found["signed"][-1] < -0.5 < found["signed"][0]
    same = radial_spectrum_difference(images, images)
    assert same["mean_absolute"] == 0.0


def test_sensitivity_grows_with_the_perturbation() -> None:
    latents = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    found = decoding_sensitivity(
        latents, lambda x: x, lambda a, b: (a - b).flatten(1).norm(dim=1), relative_norms=(0.0, 0.1)
    )
    expected = 0.1 * latents.flatten(1).norm(dim=1).mean().item()
    assert found["lpips"] == pytest.approx([0.0, expected], rel=1e-4)


def test_histogram_counts_every_token() -> None:
    found = angle_histogram(np.linspace(0, 10, 33), num_bins=4)
    assert sum(found["counts"]) == 33
    assert len(found["edges_degrees"]) == 5
