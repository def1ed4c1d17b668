"""Reconstruct held-out photos with every model of a run and measure each image.

One pass over the photos: the encoder runs once per batch, its base latent serves RAE and the
control, the fused latent serves the fusion before and after fine-tuning. Values are kept per image,
so that every comparison can be paired.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import torch

from drorae.evaluation.bootstrap import Interval, intervals, paired_differences
from drorae.evaluation.features import FeatureSet
from drorae.evaluation.image_metrics import lpips_per_image, psnr_per_image, ssim_per_image
from drorae.evaluation.inference import Tokenizer
from drorae.shapes import Tensor

__all__ = [
    "PAIRS",
    "Photos",
    "Reconstructions",
    "join_features",
    "model_latents",
    "per_image_table",
    "reconstruct_photos",
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
    """Everything that one pass over the photos yields."""

    ids: np.ndarray
    """Row ids of the photos in the split."""
    labels: np.ndarray
    """Class of each photo."""
    values: dict[str, dict[str, np.ndarray]]
    """Per-image values: model, metric, array in the order of `ids`."""
    photo_features: FeatureSet
    """Features of the photos: the reference set of every distance."""
    features: dict[str, FeatureSet]
    """Features of each model's reconstructions."""
    examples: dict[str, np.ndarray]
    """First few photos ("photo") and their reconstructions, uint8 [N, 3, H, W]."""


def model_latents(tokenizer: Tokenizer) -> dict[str, tuple[str, str]]:
    """The models that the loaded decoders make possible."""
    return {m: parts for m, parts in MODELS.items() if parts[1] in tokenizer.decoders}


def reconstruct_photos(
    tokenizer: Tokenizer,
    photos: Photos,
    *,
    num_images: int,
    batch_images: int,
    num_examples: int,
    lpips: Callable[[Tensor, Tensor], Tensor],
    features: Callable[[Tensor], FeatureSet],
    on_progress: Callable[[int], None] | None = None,
) -> Reconstructions:
    """Measure every model on the photos with ids 0 to `num_images` - 1.

    Args:
        tokenizer: Loaded models.
        photos: Held-out split.
        num_images: Photos to use.
        batch_images: Photos per forward pass.
        num_examples: Photos kept for the grid.
        lpips: LPIPS per image of two batches in [0, 1].
        features: Features of a uint8 batch.
        on_progress: Told the number of finished photos.
    """
    models = model_latents(tokenizer)
    values: dict[str, dict[str, list[np.ndarray]]] = {
        model: {metric: [] for metric in METRICS} for model in models
    }
    found: dict[str, list[FeatureSet]] = {name: [] for name in ("photo", *models)}
    examples: dict[str, list[np.ndarray]] = {name: [] for name in ("photo", *models)}
    labels = []
    for start in range(0, num_images, batch_images):
        ids = np.arange(start, min(start + batch_images, num_images))
        images, batch_labels = photos.read(ids)
        labels.append(batch_labels.numpy())
        drawn = {"photo": images} | _reconstruct(tokenizer, images, models)
        for name, batch in drawn.items():
            found[name].append(features(batch))
            examples[name].append(batch[: max(0, num_examples - start)].numpy())
        for model in models:
            for metric, column in _measure(images, drawn[model], lpips, tokenizer.device).items():
                values[model][metric].append(column)
        if on_progress is not None:
            on_progress(int(ids[-1]) + 1)
    joined = {name: join_features(parts) for name, parts in found.items()}
    return Reconstructions(
        ids=np.arange(num_images),
        labels=np.concatenate(labels),
        values={m: {k: np.concatenate(v) for k, v in v.items()} for m, v in values.items()},
        photo_features=joined.pop("photo"),
        features=joined,
        examples={name: np.concatenate(parts) for name, parts in examples.items()},
    )


def summarise(
    found: Reconstructions, *, replicates: int, seed: int
) -> tuple[dict[str, dict[str, Interval]], dict[str, dict[str, Interval]]]:
    """Intervals of each model and of paired differences, by resampling within classes."""
    shared = {"labels": found.labels, "replicates": replicates, "seed": seed}
    means = {model: intervals(columns, **shared) for model, columns in found.values.items()}
    differences = {
        f"{first}-{second}": paired_differences(found.values[first], found.values[second], **shared)
        for first, second in PAIRS
        if first in found.values and second in found.values
    }
    return means, differences


def per_image_table(found: Reconstructions) -> pa.Table:
    """Long table: one row per photo and model."""
    models = list(found.values)
    count = len(found.ids)
    columns = {
        "id": pa.array(np.tile(found.ids, len(models)), pa.int64()),
        "label": pa.array(np.tile(found.labels, len(models)), pa.int32()),
        "model": pa.array([model for model in models for _ in range(count)], pa.string()),
    }
    for metric in METRICS:
        stacked = np.concatenate([found.values[model][metric] for model in models])
        columns[metric] = pa.array(stacked, pa.float32())
    return pa.table(columns)


def join_features(parts: list[FeatureSet]) -> FeatureSet:
    """Rows of several sets as one."""
    return FeatureSet(
        pooled=np.concatenate([p.pooled for p in parts]),
        logits=np.concatenate([p.logits for p in parts]),
    )


def _reconstruct(
    tokenizer: Tokenizer, images: Tensor, models: dict[str, tuple[str, str]]
) -> dict[str, Tensor]:
    latents = tokenizer.encode(images)
    return {
        model: tokenizer.decode(getattr(latents, which), stage)
        for model, (which, stage) in models.items()
    }


def _measure(
    images: Tensor,
    drawn: Tensor,
    lpips: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
) -> dict[str, np.ndarray]:
    photos, other = images.to(device), drawn.to(device)
    columns = {
        "psnr": psnr_per_image(photos, other),
        "ssim": ssim_per_image(photos, other),
        "lpips": lpips_per_image(photos, other, lpips),
    }
    return {name: column.cpu().numpy() for name, column in columns.items()}
