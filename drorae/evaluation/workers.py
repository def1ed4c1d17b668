"""The actors of `evaluate`: pictures are made, measured and forgotten where the accelerator is.

What a task leaves behind are files in the stage's work folder: features, values per image, and the
few pictures that are shown. Its result is a few numbers; images do not travel.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drorae.config import digest
from drorae.data.assets import asset_path
from drorae.data.images import ImageShards
from drorae.data.shard_cache import node_cache
from drorae.data.shard_map import ShardTask
from drorae.evaluation.features import Features, build_features
from drorae.evaluation.frechet import (
    Gaussian,
    Reference,
    distances,
    fit_gaussian,
    frechet_distance,
    reference_of,
)
from drorae.evaluation.inference import Generator, Tokenizer
from drorae.evaluation.inspection import inspect_tokenizer
from drorae.evaluation.job import EvaluateJob
from drorae.evaluation.loading import load_generator, load_tokenizer
from drorae.evaluation.photos import PhotoBatch, photo_batches
from drorae.evaluation.reconstruction import measure, reconstruct
from drorae.evaluation.stored import (
    StoredSet,
    feature_uri,
    read_arrays,
    read_features,
    values_uri,
    write_arrays,
    write_features,
)
from drorae.evaluation.tasks import (
    PHOTOS,
    REAL,
    Extent,
    decoder_stages,
    feature_sets,
    sampler_settings,
    set_name,
)
from drorae.losses.perceptual import load_perceptual
from drorae.models.encoder import EncoderConfig
from drorae.models.matmul import number_format
from drorae.shapes import Tensor
from drorae.store import files
from drorae.store.context import StageContext

__all__ = ["ImageWorker", "MeasureWorker"]


class ImageWorker:
    """Reconstructs photos, draws samples, reads training photos, looks inside the fusion.

    Networks are loaded when a task first needs them, once in an actor. Memory grows with the
    images of a batch and the features of a task, not with the number of images.

    Args:
        ctx: The stage.
        encoder: The frozen encoder.
        evaluate: What to measure.
        seed: Seed of noise, untrained network and perturbations.
    """

    def __init__(
        self, ctx: StageContext, encoder: EncoderConfig, evaluate: EvaluateJob, seed: int
    ) -> None:
        self._ctx, self._encoder, self._job, self._seed = ctx, encoder, evaluate, seed
        self._device = torch.device(ctx.compute.device_type)

    def __call__(self, task: ShardTask) -> dict[str, Any]:
        """Do one task; returns what it found that is small."""
        kind, payload = task.payload["kind"], task.payload
        with number_format("float32", self._device.type), torch.no_grad():
            if kind == "inspect":
                return self._inspect()
            ids = range(payload["start"], payload["stop"])
            if kind == "reconstruct":
                self._reconstruct(ids)
            elif kind == REAL:
                self._read_real(ids)
            else:
                self._sample(kind, ids)
        return {"feature_identity": self._features.identity}

    def _reconstruct(self, ids: range) -> None:
        arrays, features = _Columns(), _Columns()
        for batch, images, labels in self._photo_batches("val", ids):
            images = images.to(self._device)
            shown = torch.from_numpy(batch < self._job.num_grid_images)
            drawn = reconstruct(self._tokenizer, images)
            arrays.add("labels", labels.numpy())
            for model, pictures in drawn.items():
                arrays.add(f"values/{model}", measure(images, pictures, self._lpips))
            for name, pictures in {"photo": images, **drawn}.items():
                arrays.add(f"shown/{name}", pictures[shown].cpu().numpy())
                folder = PHOTOS if name == "photo" else f"{PHOTOS}-{name}"
                features.add(folder, self._features.of(pictures))
        self._write(features, ids)
        write_arrays(values_uri(self._ctx.work_uri, PHOTOS, ids.start), **arrays.joined())

    def _sample(self, guidance: str, ids: range) -> None:
        job, arrays, features = self._job, _Columns(), _Columns()
        generator = self._floor if guidance == "untrained" else self._generator
        settings, stages = sampler_settings(guidance, job), decoder_stages(guidance, job)
        classes = generator.num_classes
        for batch in self._batches(ids):
            labels = torch.from_numpy(batch % classes)
            latents = generator.sample(labels, batch.tolist(), settings, self._seed)
            for stage in stages:
                pictures = self._tokenizer.decode(latents, stage)
                features.add(set_name(guidance, stage, job), self._features.of(pictures))
                if stage == job.decoder_for_samples:
                    row, column = batch % classes, batch // classes
                    shown = (row < job.num_grid_classes) & (column < job.num_grid_images)
                    arrays.add("index", batch[shown])
                    arrays.add("images", pictures[torch.from_numpy(shown)].cpu().numpy())
        self._write(features, ids)
        write_arrays(values_uri(self._ctx.work_uri, guidance, ids.start), **arrays.joined())

    def _read_real(self, ids: range) -> None:
        uri = feature_uri(self._ctx.work_uri, REAL, ids.start)
        cached = self._cache_file(ids)
        if cached is not None and cached.exists():
            files.upload(cached, uri)
            return
        batches = self._photo_batches("train", ids)
        parts = [self._features.of(images) for _, images, _ in batches]
        write_features(uri, parts)
        if cached is not None:
            write_features(str(cached), parts)

    def _inspect(self) -> dict[str, Any]:
        found = inspect_tokenizer(
            self._tokenizer,
            self._generator,
            self._photos("val"),
            num_images=min(self._job.num_diagnostic_images, len(self._photos("val"))),
            lpips=self._lpips,
            seed=self._seed,
        )
        if found.routing is not None:
            write_arrays(values_uri(self._ctx.work_uri, "routing", 0), picture=found.routing)
        return {"report": found.report, "has_routing": found.routing is not None}

    def _write(self, features: "_Columns", ids: range) -> None:
        for folder, parts in features.items():
            write_features(feature_uri(self._ctx.work_uri, folder, ids.start), parts)

    def _batches(self, ids: range) -> Iterator[np.ndarray]:
        for start in ids[:: self._job.batch_images]:
            yield np.arange(start, min(start + self._job.batch_images, ids.stop))

    def _photo_batches(self, split: str, ids: range) -> Iterator[PhotoBatch]:
        return photo_batches(self._photos(split), ids, self._job.batch_images)

    def _cache_file(self, ids: range) -> Path | None:
        """Features of training photos, by the content of the shards and of the weights."""
        if not self._ctx.compute.cache_path:
            return None
        shard = self._ctx.inputs["shard"]
        content = [shard.entry(name).sha256 for name in shard.names("train/")]
        key = [self._features.identity, content, ids.start, len(ids), self._job.batch_images]
        return Path(self._ctx.compute.cache_path) / "features" / f"{digest(key)}.npz"

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(
            self._ctx.inputs,
            device=self._device,
            encoder=self._encoder,
            precision=self._job.precision,
        )

    @functools.cached_property
    def _generator(self) -> Generator:
        return load_generator(self._ctx.inputs, device=self._device, precision=self._job.precision)

    @functools.cached_property
    def _floor(self) -> Generator:
        return self._generator.untrained(self._seed)

    @functools.cached_property
    def _lpips(self) -> Callable[[Tensor, Tensor], Tensor]:
        return load_perceptual(asset_path(f"lpips-{self._job.lpips_net}")).to(self._device)

    @functools.cached_property
    def _features(self) -> Features:
        job = self._job
        is_lite = job.feature_extractor == "efficientnet-lite0"
        return build_features(
            job.feature_extractor,
            asset_path("efficientnet-lite0") if is_lite else Path(job.inception_weights_path),
            feature_px=job.feature_px,
            batch_images=job.batch_images,
            device=self._device,
        )

    @functools.cache  # noqa: B019 - an actor has one worker
    def _photos(self, split: str) -> ImageShards:
        cache, threads = node_cache(self._ctx.compute), self._ctx.compute.loader_threads
        return ImageShards(
            self._ctx.inputs["shard"], split, cache=cache, keep_bytes=0, threads=threads
        )


class MeasureWorker:
    """Compares one set a task with the reference photos.

    Holds the features of two sets: 4 bytes a number, 0.8 GB for 50,000 x 2,048 twice.

    Args:
        ctx: The stage.
        evaluate: What to measure.
        extent: How much there is.
    """

    def __init__(self, ctx: StageContext, evaluate: EvaluateJob, extent: Extent) -> None:
        self._ctx, self._job = ctx, evaluate
        self._sets = feature_sets(evaluate, extent)
        self._photos = StoredSet(
            folder=PHOTOS, num_images=extent.num_photos, chunk=evaluate.chunk_photos
        )

    def __call__(self, task: ShardTask) -> dict[str, Any]:
        """Distances of one set, or the Frechet distance alone."""
        stored = self._sets[task.payload["set"]]
        features = read_features(stored.uris(self._ctx.work_uri), stored.num_images)
        if task.payload["frechet_only"]:
            target, root = self._reference.gaussian, self._reference.root
            return {"fd": frechet_distance(fit_gaussian(features.pooled), target, root)}
        found = distances(
            features,
            self._reference,
            kid_subset=self._job.kid_subset,
            isc_splits=self._job.isc_splits,
            cross_check=task.payload["cross_check"],
            device=self._ctx.compute.device_type,
        )
        return {**found.as_dict(), "decoder": stored.decoder}

    @functools.cached_property
    def _reference(self) -> Reference:
        """Computed by the first actor that needs it, and read by the others and after a restart."""
        pooled = read_features(
            self._photos.uris(self._ctx.work_uri), self._photos.num_images
        ).pooled
        uri = files.join(self._ctx.work_uri, "reference.npz")
        if files.exists(uri):
            known = read_arrays(uri)
            gaussian = Gaussian(mean=known["mean"], covariance=known["covariance"])
            return Reference(
                pooled=pooled, gaussian=gaussian, root=known["root"], radii=known["radii"]
            )
        found = reference_of(pooled, self._ctx.compute.device_type)
        write_arrays(
            uri,
            mean=found.gaussian.mean,
            covariance=found.gaussian.covariance,
            root=found.root,
            radii=found.radii,
        )
        return found


class _Columns(dict[str, list[Any]]):
    """Parts by name, in the order in which they came."""

    def add(self, name: str, part: Any) -> None:
        self.setdefault(name, []).append(part)

    def joined(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate(parts) for name, parts in self.items()}
