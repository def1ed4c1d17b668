"""Reconstruct held-out photos with every model of a run and measure each image.

The encoder runs once a batch: its base latent serves RAE and the control, the fused latent serves
the fusion before and after fine-tuning. Values are kept per image, so that every comparison can be
paired.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import torch

from drorae.evaluation.bootstrap import Interval, intervals
from drorae.evaluation.image_metrics import lpips_per_image, psnr_per_image, ssim_per_image
from drorae.evaluation.inference import Tokenizer
from drorae.shapes import Float, Tensor, UInt8

__all__ = [
    "METRICS",
    "MODELS",
    "PAIRS",
    "Photos",
    "Reconstructions",
    "join_chunks",
    "measure",
    "model_latents",
    "per_image_table",
    "reconstruct",
    "summarise",
]

METRICS = ("psnr", "ssim", "lpips")
MODELS = {
    "rae": ("base", "decoder"),
    "fusion": ("latent", "decoder"),
    "finetune": ("latent", "finetune"),
    "control": ("base", "control"),
}
"""Model -> which latent (`base` is RAE's) and the stage whose decoder draws it."""
PAIRS = (
    ("fusion", "rae"),
    ("finetune", "fusion"),
    ("finetune", "rae"),
    ("finetune", "control"),
)


@runtime_checkable
class Photos(Protocol):
    """Decoded images of one split (`drorae.data.images.ImageShards`)."""

    def __len__(self) -> int: ...
    def read(self, ids: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images uint8 [B, 3, H, W] and labels of the given ids."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconstructions:
    """Everything that is kept of the photos and their reconstructions, beside features."""

    labels: np.ndarray
    """Class of each photo, by its row in the split."""
    values: dict[str, dict[str, np.ndarray]]
    """Per-image values: model, metric, array in the order of the photos."""
    shown: dict[str, np.ndarray]
    """First few photos ("photo") and their reconstructions, uint8 [N, 3, H, W]."""


def model_latents(decoders: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The models that decoders of these stages make possible."""
    return {model: parts for model, parts in MODELS.items() if parts[1] in decoders}


def reconstruct(
    tokenizer: Tokenizer, images: UInt8[Tensor, "batch 3 height width"]
) -> dict[str, UInt8[Tensor, "batch 3 height width"]]:
    """Reconstructions of photos by every model, on the device."""
    latents = tokenizer.encode(images)
    return {
        model: tokenizer.decode(getattr(latents, which), stage)
        for model, (which, stage) in model_latents(tokenizer.decoders).items()
    }


def measure(
    images: UInt8[Tensor, "batch 3 height width"],
    drawn: UInt8[Tensor, "batch 3 height width"],
    lpips: Callable[[Tensor, Tensor], Tensor],
) -> Float[np.ndarray, "batch 3"]:
    """PSNR, SSIM and LPIPS of each image.

    Args:
        images: Photos, on the device of the network.
        drawn: Their reconstructions.
        lpips: LPIPS per image of two batches in [0, 1].
    """
    columns = (
        psnr_per_image(images, drawn),
        ssim_per_image(images, drawn),
        lpips_per_image(images, drawn, lpips),
    )
    return torch.stack(columns, dim=1).cpu().numpy()


def join_chunks(chunks: Sequence[Mapping[str, np.ndarray]]) -> Reconstructions:
    """Results of consecutive photos as one.

    Args:
        chunks: Arrays `labels`, `values/<model>` [N, 3] and `shown/<name>` of each.
    """
    joined = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    values = {name: joined[f"values/{name}"] for name in MODELS if f"values/{name}" in joined}
    return Reconstructions(
        labels=joined["labels"],
        values={m: dict(zip(METRICS, table.T, strict=True)) for m, table in values.items()},
        shown={name: joined[f"shown/{name}"] for name in ("photo", *values)},
    )


def summarise(
    found: Reconstructions, *, replicates: int, seed: int
) -> tuple[dict[str, dict[str, Interval]], dict[str, dict[str, Interval]]]:
    """Intervals of each model and of paired differences, by resampling classes.

    All share one set of draws, which is what costs: time grows with replicates times photos.
    """
    tables = dict(found.values)
    for first, second in PAIRS:
        if first in found.values and second in found.values:
            left, right = found.values[first], found.values[second]
            tables[f"{first}-{second}"] = {m: left[m] - right[m] for m in METRICS}
    columns = {f"{name}/{m}": table[m] for name, table in tables.items() for m in METRICS}
    drawn = intervals(columns, labels=found.labels, replicates=replicates, seed=seed)
    rows = {name: {m: drawn[f"{name}/{m}"] for m in METRICS} for name in tables}
    means = {name: rows[name] for name in found.values}
    return means, {name: row for name, row in rows.items() if name not in means}


def per_image_table(found: Reconstructions) -> pa.Table:
    """Long table: one row per photo and model."""
    models = list(found.values)
    count = len(found.labels)
    columns = {
        "id": pa.array(np.tile(np.arange(count), len(models)), pa.int64()),
        "label": pa.array(np.tile(found.labels, len(models)), pa.int32()),
        "model": pa.array([model for model in models for _ in range(count)], pa.string()),
    }
    for metric in METRICS:
        stacked = np.concatenate([found.values[model][metric] for model in models])
        columns[metric] = pa.array(stacked, pa.float32())
    return pa.table(columns)
