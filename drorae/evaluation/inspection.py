"""Run all diagnostics of a loaded tokenizer on held-out photos."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from drorae.evaluation.diagnostics import (
    angle_histogram,
    angle_report,
    decoding_sensitivity,
    radial_spectrum_difference,
    routing_maps,
    routing_report,
)
from drorae.evaluation.grids import image_grid, to_hwc
from drorae.evaluation.image_metrics import to_unit
from drorae.evaluation.inference import Generator, Tokenizer
from drorae.evaluation.reconstruction import Photos, model_latents
from drorae.models.autoencoder import denormalise_latent, normalise_latent
from drorae.models.fusion_config import FusionConfig
from drorae.models.fusion_output import FusionOutput, token_angles_deg
from drorae.models.layers import map_to_tokens, tokens_to_map
from drorae.shapes import Tensor

__all__ = ["Inspection", "inspect_tokenizer", "routing_picture"]

ROUTING_ROWS = 6
BLUE, ORANGE, NEUTRAL = (47, 126, 216), (224, 123, 57), (245, 245, 245)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """Numbers for `metrics.json` and the routing picture."""

    report: dict[str, Any]
    routing: np.ndarray | None
    """Labelled uint8 picture, or None for a fusion without weights."""


def inspect_tokenizer(
    tokenizer: Tokenizer,
    generator: Generator,
    photos: Photos,
    *,
    num_images: int,
    lpips: Callable[[Tensor, Tensor], Tensor],
    seed: int,
) -> Inspection:
    """Measure the inside of the fusion on the first photos of a split.

    Args:
        tokenizer: Loaded models.
        generator: Gives the latent statistics in which perturbations are measured.
        photos: Held-out split.
        num_images: Photos to use, in one batch.
        lpips: LPIPS per image of two batches in [0, 1].
        seed: Seed of the perturbations.
    """
    images, _ = photos.read(np.arange(min(num_images, len(photos))))
    latents = tokenizer.encode(images)
    report: dict[str, Any] = {"num_images": len(images)}
    report |= _angles(latents, bounding_beta(tokenizer.fusion_config))
    report["spectra"] = _spectra(tokenizer, images, latents)
    report["sensitivity"] = _sensitivity(tokenizer, generator, latents, lpips, seed)
    picture = None
    if latents.weights is not None:
        weights = latents.weights.float()  # NumPy has no bfloat16
        report["routing"] = routing_report(weights)
        picture = routing_picture(images, weights)
    return Inspection(report=report, routing=picture)


def routing_picture(images: Tensor, weights: Tensor) -> np.ndarray:
    """A few photos with the signed routing map of every layer beside them."""
    unit = weights / weights.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    maps = routing_maps(unit[:ROUTING_ROWS]).cpu().numpy()
    photos = to_hwc(images[:ROUTING_ROWS].numpy())
    height, width = photos.shape[1:3]
    limit = max(float(np.abs(maps).max()), 1e-6)
    rows = []
    for photo, layers in zip(photos, maps, strict=True):
        tiles = [_enlarge(_signed_colours(layer / limit), height, width) for layer in layers]
        rows.append(np.stack([photo, *tiles]))
    columns = ["photo", *(f"layer {i + 1}" for i in range(maps.shape[1]))]
    return image_grid(rows, column_labels=columns)


def bounding_beta(config: FusionConfig) -> float:
    """The blend weight that bounds the rotation; 1 (no bound) for another kind of fusion."""
    return config.beta if config.kind == "drorae" and config.incremental else 1.0


def _angles(latents: FusionOutput, beta: float) -> dict[str, Any]:
    fused = latents.latent if latents.fused is None else latents.fused
    angles = token_angles_deg(latents.latent, latents.base).flatten().cpu().numpy()
    return {
        "angles": angle_report(latents.latent, latents.base, fused, beta),
        "angle_histogram": angle_histogram(angles),
    }


def _spectra(tokenizer: Tokenizer, images: Tensor, latents: FusionOutput) -> dict[str, Any]:
    photos = to_unit(images.to(tokenizer.device))
    return {
        model: radial_spectrum_difference(
            photos, to_unit(tokenizer.decode(getattr(latents, which), stage))
        )
        for model, (which, stage) in model_latents(tokenizer.decoders).items()
    }


def _sensitivity(
    tokenizer: Tokenizer,
    generator: Generator,
    latents: FusionOutput,
    lpips: Callable[[Tensor, Tensor], Tensor],
    seed: int,
) -> dict[str, Any]:
    curves = {}
    for stage, decoder in tokenizer.decoders.items():
        tokens = latents.base if stage == "control" else latents.latent

        def decode(normal: Tensor, decoder: Any = decoder) -> Tensor:
            raw = denormalise_latent(normal, generator.mean, generator.var)
            return decoder(map_to_tokens(raw)).clamp(0.0, 1.0)

        normal = normalise_latent(tokens_to_map(tokens), generator.mean, generator.var)
        curves[stage] = decoding_sensitivity(normal, decode, lpips, seed=seed)
    return curves


def _signed_colours(values: np.ndarray) -> np.ndarray:
    """[-1, 1] to orange, near white, blue."""
    strength = np.abs(values)[..., None].clip(0.0, 1.0)
    ends = np.where(values[..., None] >= 0, np.array(BLUE), np.array(ORANGE))
    return ((1.0 - strength) * np.array(NEUTRAL) + strength * ends).astype(np.uint8)


def _enlarge(tile: np.ndarray, height: int, width: int) -> np.ndarray:
    rows = np.arange(height) * tile.shape[0] // height
    columns = np.arange(width) * tile.shape[1] // width
    return tile[rows][:, columns]
