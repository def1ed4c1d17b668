"""Stage `latents`: every training image is encoded and fused once; diffusion reads the result.

Stored are raw latents in float16 and the exact mean and population variance per element [channels,
height, width] of what is stored, or on request the statistics that came with an imported decoder.
`latent_shards.LatentShards` gives them back normalised. Encoding
runs on Ray Data, one task a shard.
"""

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from drorae.config import from_json, to_json
from drorae.data.assets.catalog import asset_path
from drorae.data.hidden_states import (
    HiddenEncoder,
    HiddenStates,
    cache_folder,
    encoder_digest,
    hidden_cache_path,
    to_unit,
)
from drorae.data.images import ImageShards
from drorae.data.jobs import LatentJob
from drorae.data.latent_shards import SPLIT, LatentShards
from drorae.data.shard_map import Executor, ShardTask, map_shards
from drorae.data.statistics import Moments
from drorae.models.autoencoder import tokens_to_map
from drorae.models.encoder import EncoderConfig, build_encoder
from drorae.models.fusion import FusionConfig, build_fusion
from drorae.shapes import Float, Tensor, UInt8
from drorae.store import files
from drorae.store.context import StageContext, StageResult
from drorae.store.files import FileEntry

__all__ = ["LatentJob", "LatentShards", "run_latents"]

ROW_GROUP = 256
"""Rows of a row group in latent shards."""


def run_latents(
    ctx: StageContext,
    *,
    encoder: EncoderConfig,
    latents: LatentJob,
    executor: Executor | None = None,
) -> StageResult:
    """Encode all training images of the `shard` input with the encoder and the `fusion` input.

    Args:
        ctx: Where to write, inputs, and what to report to.
        encoder: The frozen encoder.
        latents: The job.
        executor: Who runs the shard tasks; Ray Data unless given.

    Raises:
        ValueError: The encoder is not the one that the fusion was trained with.
    """
    shard, fusion = ctx.inputs["shard"], ctx.inputs["fusion"]
    trained_with = fusion.read_json("config.json")["encoder"]
    if trained_with != to_json(encoder):
        raise ValueError(
            f"the fusion {fusion.uri} was trained with encoder {trained_with}: "
            f"expected the configured {to_json(encoder)}. Use one encoder section for both."
        )
    counts = shard.read_json("counts.json")[SPLIT]
    starts = np.cumsum([0, *counts["shards"]]).tolist()
    tasks = [
        ShardTask(f"part-{part:05d}", {"first_id": starts[part], "rows": rows})
        for part, rows in enumerate(counts["shards"])
    ]
    results = map_shards(
        tasks,
        functools.partial(EncodeShard, ctx, encoder, latents),
        work_uri=ctx.work_uri,
        compute=ctx.compute,
        on_progress=lambda done, total: ctx.progress(
            starts[min(done, len(tasks))], counts["rows"], "images"
        ),
        num_gpus=1.0 if ctx.compute.use_gpu else 0.0,
        executor=executor,
    )
    return _finish(ctx, encoder, latents, results)


class EncodeShard:
    """Encode one shard; the encoder and the fusion are loaded once in an actor.

    Args:
        ctx: The stage.
        encoder: The frozen encoder.
        job: The job.
    """

    def __init__(self, ctx: StageContext, encoder: EncoderConfig, job: LatentJob) -> None:
        self._ctx, self._job = ctx, job
        device = torch.device(ctx.compute.device_type)
        model = build_encoder(encoder, asset_path).to(device)
        self._encoder: HiddenEncoder = model
        fusion = ctx.inputs["fusion"]
        settings = from_json(FusionConfig, fusion.read_json("config.json")["model"])
        self._fusion = build_fusion(
            settings, model.num_layers, model.width, layer_norm_eps=model.layer_norm_eps
        )
        weights = files.read_bytes(fusion.uri_of("fusion.safetensors"))
        self._fusion.load_state_dict(safetensors.torch.load(weights))
        self._fusion.to(device).eval()
        self._device = device
        cache = hidden_cache_path(ctx)
        self._images = ImageShards(ctx.inputs["shard"], SPLIT, cache_path=cache)
        self._hidden = self._open_cache(cache)

    def _open_cache(self, cache: Path) -> HiddenStates:
        key = encoder_digest(self._encoder)
        filled = cache_folder(cache, self._images, key).is_dir()
        return HiddenStates(
            self._images,
            self._encoder,
            "disk" if filled else "none",
            cache,
            encoder_key=key,
            batch_images=self._job.batch_images,
        )

    def __call__(self, task: ShardTask) -> dict[str, Any]:
        """Write `train/<task name>.parquet` and the moments of its latents."""
        first, rows = int(task.payload["first_id"]), int(task.payload["rows"])
        columns: dict[str, list[np.ndarray]] = {"latent": []}
        labels: list[np.ndarray] = []
        for start in range(first, first + rows, self._job.batch_images):
            ids = np.arange(start, min(start + self._job.batch_images, first + rows))
            images, batch_labels = self._images.read(ids)
            labels.append(batch_labels.numpy())
            columns["latent"].append(self._fuse(self._hidden.read(ids)))
            if self._job.flip:
                columns.setdefault("latent_flip", []).append(self._encode_flipped(images))
        arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
        entry = self._write(task.name, first, np.concatenate(labels), arrays)
        self._write_moments(task.name, arrays)
        size = {"size_bytes": entry.size_bytes, "sha256": entry.sha256}
        shape = list(arrays["latent"].shape[1:])
        return {"name": f"{SPLIT}/{task.name}.parquet", "rows": rows, "shape": shape, **size}

    @torch.no_grad()
    def _fuse(self, hidden: Float[Tensor, "batch layers tokens width"]) -> np.ndarray:
        tokens = self._fusion(hidden.to(self._device, torch.float32)).latent
        latent = tokens_to_map(tokens).to(torch.float16).cpu()
        if not bool(torch.isfinite(latent).all()):
            raise RuntimeError(
                "latents exceed the range of float16 (65504): expected values of order 1. "
                "The fusion weights are damaged; train the fusion again."
            )
        return latent.numpy()

    @torch.no_grad()
    def _encode_flipped(self, images: UInt8[Tensor, "batch 3 height width"]) -> np.ndarray:
        pixels = to_unit(images.to(self._device)).flip(-1)
        return self._fuse(self._encoder(pixels).to(torch.float16))

    def _write(
        self, name: str, first: int, labels: np.ndarray, arrays: dict[str, np.ndarray]
    ) -> FileEntry:
        columns: dict[str, Any] = {
            "id": pa.array(np.arange(first, first + len(labels)), pa.int64()),
            "label": pa.array(labels, pa.int32()),
        }
        for column, values in arrays.items():
            contiguous = np.ascontiguousarray(values)
            columns[column] = pa.FixedShapeTensorArray.from_numpy_ndarray(contiguous)
        buffer = pa.BufferOutputStream()
        table = pa.table(columns)
        pq.write_table(
            table, buffer, compression="none", use_dictionary=False, row_group_size=ROW_GROUP
        )
        uri = files.join(self._ctx.output_uri, SPLIT, f"{name}.parquet")
        return files.write_bytes(uri, buffer.getvalue().to_pybytes())

    def _write_moments(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        moments = Moments.empty(arrays["latent"].shape[1:])
        for values in arrays.values():
            # A few rows at a time: a float64 copy of a whole shard would be four times its size.
            for start in range(0, len(values), ROW_GROUP):
                moments = moments.update(values[start : start + ROW_GROUP])
        buffer = io.BytesIO()
        np.savez(buffer, count=moments.count, mean=moments.mean, m2=moments.m2)
        files.write_bytes(_moments_uri(self._ctx, name), buffer.getvalue())


def _moments_uri(ctx: StageContext, name: str) -> str:
    return files.join(ctx.work_uri, "moments", f"{name}.npz")


def _finish(
    ctx: StageContext, encoder: EncoderConfig, job: LatentJob, results: list[dict[str, Any]]
) -> StageResult:
    shape = tuple(results[0]["shape"])
    moments = Moments.empty(shape)
    for result in results:  # in shard order: float64 addition is not associative
        moments = moments.merge(_read_moments(ctx, Path(result["name"]).stem))
    computed = {
        "mean": torch.from_numpy(moments.mean.astype(np.float32)),
        "var": torch.from_numpy(moments.var.astype(np.float32)),
    }
    stats = _imported_stats(ctx, shape) if job.stats == "imported" else computed
    rows = [result["rows"] for result in results]
    counts = {SPLIT: {"rows": sum(rows), "shards": rows}, "shape": list(shape), "flip": job.flip}
    fusion = ctx.inputs["fusion"].read_json("config.json")["model"]
    settings = {"latents": to_json(job), "encoder": to_json(encoder), "fusion": fusion}
    written = [
        FileEntry(name=r["name"], size_bytes=r["size_bytes"], sha256=r["sha256"]) for r in results
    ]
    written += [
        ctx.put_bytes("stats.safetensors", safetensors.torch.save(stats)),
        ctx.put_json("counts.json", counts),
        ctx.put_json("config.json", settings),
    ]
    metrics = {
        "latents/images": float(sum(rows)),
        "latents/mean_abs": float(np.abs(moments.mean).mean()),
        "latents/var_mean": float(moments.var.mean()),
    }
    if job.stats == "imported":
        # RAE's own momentum statistics lie about 0.008 from exact ones (its README).
        gap = (stats["var"] - computed["var"]).abs().mean()
        metrics["latents/imported_var_gap"] = float(gap)
    return StageResult(files=written, metrics=metrics)


def _imported_stats(ctx: StageContext, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The statistics beside an imported decoder, which are those of RAE's last-layer latents."""
    kind = ctx.inputs["fusion"].read_json("config.json")["model"]["kind"]
    if kind != "rae":
        raise ValueError(
            f"latents.stats=imported with a fusion of kind {kind}: expected kind rae, whose "
            "latents the statistics belong to; set latents.stats=computed."
        )
    decoder = ctx.inputs["decoder"]
    stats = safetensors.torch.load(files.read_bytes(decoder.uri_of("stats.safetensors")))
    if tuple(stats["mean"].shape) != shape:
        raise ValueError(
            f"the statistics in {decoder.uri} have shape {tuple(stats['mean'].shape)}: expected "
            f"that of the latents, {shape}; import the file of this image size."
        )
    return stats


def _read_moments(ctx: StageContext, name: str) -> Moments:
    arrays = np.load(io.BytesIO(files.read_bytes(_moments_uri(ctx, name))))
    return Moments(count=int(arrays["count"]), mean=arrays["mean"], m2=arrays["m2"])
