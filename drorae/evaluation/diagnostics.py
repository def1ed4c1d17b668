"""What the fusion does inside: routing, angles to the base latent, spectra, decoding sensitivity.

All functions are pure: tensors in, numbers or arrays out. The angle is the real trust region of
DRoRAE: both ends of the blend have unit norm, so beta bounds the rotation of a token at asin(beta /
(1 - beta)), reached at cos(fused, base) = -beta / (1 - beta).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional

from drorae.diffusion.noise import noise
from drorae.models.fusion_output import token_angles_deg
from drorae.shapes import Float, Tensor

__all__ = [
    "angle_histogram",
    "angle_report",
    "decoding_sensitivity",
    "effective_layers",
    "radial_spectrum_difference",
    "routing_maps",
    "routing_report",
]

NEAR_BOUND_DEGREES = 0.1


def routing_maps(
    weights: Float[Tensor, "batch tokens layers"],
) -> Float[Tensor, "batch layers rows columns"]:
    """Signed weights as one map per layer.

    Raises:
        ValueError: If the tokens form no square.
    """
    batch, tokens, layers = weights.shape
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(
            f"routing maps got {tokens} tokens: expected a square number of patch tokens."
        )
    return weights.transpose(1, 2).reshape(batch, layers, side, side)


def routing_report(weights: Float[Tensor, "batch tokens layers"]) -> dict[str, list[float] | float]:
    """Per-layer mean, spread and positive share; effective layers; smoothness of the maps."""
    unit = weights / weights.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    maps = routing_maps(unit)
    across = (maps[..., :, 1:] - maps[..., :, :-1]).abs().mean()
    down = (maps[..., 1:, :] - maps[..., :-1, :]).abs().mean()
    return {
        "mean": unit.mean(dim=(0, 1)).tolist(),
        "std": unit.std(dim=(0, 1)).tolist(),
        "positive_share": (unit > 0).float().mean(dim=(0, 1)).tolist(),
        "effective_layers": effective_layers(weights).mean().item(),
        "total_variation": ((across + down) / 2).item(),
        "raw_norm": weights.norm(dim=-1).mean().item(),
    }


def effective_layers(
    weights: Float[Tensor, "batch tokens layers"],
) -> Float[Tensor, "batch tokens"]:
    """Exp of the entropy of squared weights: 1 for one layer, L for all alike."""
    share = weights.square() / weights.square().sum(dim=-1, keepdim=True).clamp_min(1e-24)
    return torch.exp(-(share * share.clamp_min(1e-24).log()).sum(dim=-1))


def angle_report(
    latent: Float[Tensor, "batch tokens dim"],
    base: Float[Tensor, "batch tokens dim"],
    fused: Float[Tensor, "batch tokens dim"],
    beta: float,
) -> dict[str, float]:
    """How far the fusion turns each token, against what beta allows.

    Args:
        latent: Output of the fusion.
        base: Last-layer latent that RAE would use.
        fused: Normalised mixture of experts before blending.
        beta: Blend weight; at 0.5 and above there is no bound and 180 degrees is reported.
    """
    angles = token_angles_deg(latent, base).float()
    ratio = beta / (1.0 - beta) if beta < 1.0 else math.inf
    bound = math.degrees(math.asin(ratio)) if ratio < 1.0 else 180.0
    cosine = functional.cosine_similarity(latent.float(), base.float(), dim=-1)
    cosine_fused = functional.cosine_similarity(fused.float(), base.float(), dim=-1)
    return {
        "angle_mean_degrees": angles.mean().item(),
        "angle_p95_degrees": angles.flatten().quantile(0.95).item(),
        "angle_max_degrees": angles.max().item(),
        "angle_bound_degrees": bound,
        "near_bound_share": (angles > bound - NEAR_BOUND_DEGREES).float().mean().item(),
        "cosine_latent_base": cosine.mean().item(),
        "cosine_fused_base": cosine_fused.mean().item(),
        "cosine_at_bound": -min(ratio, 1.0),
    }


def radial_spectrum_difference(
    original: Float[Tensor, "batch 3 height width"],
    other: Float[Tensor, "batch 3 height width"],
    num_bands: int = 8,
) -> dict[str, list[float] | float]:
    """Difference of natural-log magnitude spectra, overall and per band from low to high frequency.

    `signed` below zero means that the reconstruction lacks energy there.
    """
    gap = _log_spectrum(other) - _log_spectrum(original)
    height, width = gap.shape[-2:]
    rows = torch.fft.fftfreq(height).reshape(-1, 1)
    columns = torch.fft.fftfreq(width).reshape(1, -1)
    radius = torch.sqrt(rows.square() + columns.square()).to(gap.device)
    band = (radius / radius.max() * num_bands).long().clamp_max(num_bands - 1)
    absolute, signed = [], []
    for index in range(num_bands):
        values = gap[:, band == index]
        absolute.append(values.abs().mean().item())
        signed.append(values.mean().item())
    return {"mean_absolute": gap.abs().mean().item(), "absolute": absolute, "signed": signed}


def _log_spectrum(images: Tensor) -> Tensor:
    weights = images.new_tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)
    gray = (images * weights).sum(dim=1)
    return torch.log(torch.fft.fft2(gray).abs() + 1e-3)


def decoding_sensitivity(
    latents: Float[Tensor, "batch channels height width"],
    decode: Callable[[Tensor], Tensor],
    distance: Callable[[Tensor, Tensor], Tensor],
    *,
    relative_norms: Sequence[float] = (0.01, 0.02, 0.05, 0.1),
    seed: int = 0,
) -> dict[str, list[float]]:
    """LPIPS between decodings of a latent and of the latent plus noise of a given relative norm.

    Args:
        latents: Normalised latents; the noise is scaled to each latent's own norm.
        decode: Normalised latents to images in [0, 1].
        distance: LPIPS per image.
        relative_norms: |noise| / |latent| to try.
        seed: Seed of the noise.

    Returns:
        "relative_norm" and the mean "lpips" at each.
    """
    drawn = noise(seed, "sensitivity", range(len(latents)), latents.shape[1:], latents.device)
    scale = latents.flatten(1).norm(dim=1) / drawn.flatten(1).norm(dim=1).clamp_min(1e-12)
    drawn = drawn * scale.reshape(-1, 1, 1, 1)
    clean = decode(latents)
    values = [
        float(distance(clean, decode(latents + norm * drawn)).mean()) for norm in relative_norms
    ]
    return {"relative_norm": [float(n) for n in relative_norms], "lpips": values}


def angle_histogram(angles: np.ndarray, num_bins: int = 40) -> dict[str, list[float]]:
    """Counts and bin edges (degrees) for the report."""
    counts, edges = np.histogram(angles, bins=num_bins)
    return {"counts": counts.astype(float).tolist(), "edges_degrees": edges.tolist()}
