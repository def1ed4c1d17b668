"""Draw samples under every guidance and measure them against held-out photos.

Sampling runs as restartable tasks (`sampling.py`); features are extracted chunk by chunk, so that
memory does not grow with the number of samples. Two ceilings are measured beside the samples: real
training photos, and reconstructions of the reference photos by the decoder that draws the samples;
the floor is the network freshly initialised.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from drorae.data.shard_map import Executor, map_shards
from drorae.evaluation.features import FeatureSet
from drorae.evaluation.frechet import distances, fit_gaussian, symmetric_root
from drorae.evaluation.job import EvaluateJob
from drorae.evaluation.reconstruction import Photos, join_features
from drorae.evaluation.sampling import SampleWorker, WorkerInputs, read_chunk, sample_tasks
from drorae.shapes import Tensor
from drorae.store.context import StageContext

__all__ = ["SampleSets", "class_rows", "draw_samples", "measure_sets", "photo_features", "set_name"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleSets:
    """Generated images by set name."""

    features: dict[str, FeatureSet]
    """Features in the order of the sample index."""
    examples: dict[str, np.ndarray]
    """First images of each set, uint8 [N, 3, H, W]: index i has class i modulo the number of
    classes."""


def set_name(guidance: str, stage: str, evaluate: EvaluateJob) -> str:
    """`cfg` for the chosen decoder, `cfg@decoder` for the swapped one."""
    return guidance if stage == evaluate.decoder_for_samples else f"{guidance}@{stage}"


def draw_samples(
    ctx: StageContext,
    inputs: WorkerInputs,
    *,
    features: Callable[[Tensor], FeatureSet],
    num_examples: int,
    on_progress: Callable[[int, int], None] | None = None,
    executor: Executor | None = None,
) -> SampleSets:
    """Draw all samples and extract their features.

    Args:
        ctx: The stage; finished chunks under its work folder are not drawn again.
        inputs: Models and settings for the actors.
        features: Features of a uint8 batch.
        num_examples: Images kept per set.
        on_progress: Told finished and total chunks.
        executor: Who runs the tasks; Ray Data unless given.
    """
    results = map_shards(
        sample_tasks(inputs.evaluate),
        functools.partial(SampleWorker, inputs),
        work_uri=ctx.work_uri,
        compute=ctx.compute,
        on_progress=on_progress,
        num_gpus=1.0 if inputs.use_gpu else 0.0,
        executor=executor,
    )
    found: dict[str, list[FeatureSet]] = {}
    examples: dict[str, np.ndarray] = {}
    for result in results:
        for stage, images in read_chunk(result["uri"]).items():
            name = set_name(result["guidance"], stage, inputs.evaluate)
            found.setdefault(name, []).append(features(images))
            kept = examples.get(name, images[:0].numpy())
            examples[name] = np.concatenate([kept, images[: num_examples - len(kept)].numpy()])
    return SampleSets(
        features={name: join_features(parts) for name, parts in found.items()}, examples=examples
    )


def photo_features(
    photos: Photos, count: int, batch_images: int, features: Callable[[Tensor], FeatureSet]
) -> FeatureSet:
    """Features of the first `count` photos of a split."""
    parts = []
    for start in range(0, count, batch_images):
        images, _ = photos.read(np.arange(start, min(start + batch_images, count)))
        parts.append(features(images))
    return join_features(parts)


def measure_sets(
    sets: dict[str, FeatureSet],
    reference: FeatureSet,
    *,
    kid_subset: int,
    isc_splits: int,
    decoders: dict[str, str],
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Every set against the reference photos; the first is cross-checked with torch-fidelity.

    Args:
        sets: Features by set name.
        reference: Features of the reference photos.
        kid_subset: Images per KID subset.
        isc_splits: Splits of the score.
        decoders: Stage of the decoder that drew a set, by set name; sets of photos have none.
        on_progress: Told the number of finished sets.
    """
    gaussian = fit_gaussian(reference.pooled)
    root = symmetric_root(gaussian.covariance)
    rows: dict[str, dict[str, Any]] = {}
    for done, (name, found) in enumerate(sets.items(), start=1):
        measured = distances(
            found,
            reference,
            kid_subset=kid_subset,
            isc_splits=isc_splits,
            reference_gaussian=gaussian,
            reference_root=root,
            cross_check=done == 1,
        )
        rows[name] = {**measured.as_dict(), "decoder": decoders.get(name)}
        if on_progress is not None:
            on_progress(done)
    return rows


def class_rows(
    images: np.ndarray, num_classes: int, shown: Sequence[int], columns: int
) -> list[np.ndarray]:
    """Rows of examples by class, from images whose class is their index modulo the classes."""
    return [images[label::num_classes][:columns] for label in shown]
