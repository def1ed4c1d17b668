"""Stage `latents`: every training image is encoded and fused once; diffusion reads the result.

Stored are raw latents in float16 and the exact mean and population variance per element [channels,
height, width] of what is stored, or on request the statistics that came with an imported decoder.
`latent_shards.LatentShards` reads them. Encoding runs on Ray Data, one task for each shard
(`encode_shard.py`).
"""

import functools
from typing import Any

import numpy as np
import safetensors.torch
import torch

from drorae.config import to_json
from drorae.data.encode_shard import EncodeShard, read_moments
from drorae.data.jobs import LatentJob
from drorae.data.latent_shards import SPLIT, LatentShards
from drorae.data.shard_format import ShardPart, write_index
from drorae.data.shard_map import Executor, ShardTask, map_shards
from drorae.data.statistics import Moments
from drorae.models.encoder import EncoderConfig
from drorae.store import files
from drorae.store.context import StageContext, StageResult

__all__ = ["LatentJob", "LatentShards", "run_latents"]


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
    tasks = [
        ShardTask(f"part-{part:05d}", {"part": part}, size=rows)
        for part, rows in enumerate(counts["shards"])
    ]
    results = map_shards(
        tasks,
        functools.partial(EncodeShard, ctx, encoder, latents),
        work_uri=ctx.work_uri,
        compute=ctx.compute,
        on_progress=lambda done, total: ctx.progress(done, total, "images"),
        worker=ctx.workers,
        executor=executor,
    )
    return _finish(ctx, encoder, latents, results)


def _finish(
    ctx: StageContext, encoder: EncoderConfig, job: LatentJob, results: list[dict[str, Any]]
) -> StageResult:
    shape = tuple(results[0]["shape"])
    moments = Moments.empty(shape)
    for result in results:  # in shard order: float64 addition is not associative
        moments = moments.merge(read_moments(ctx, result["task"]))
    computed = {
        "mean": torch.from_numpy(moments.mean.astype(np.float32)),
        "var": torch.from_numpy(moments.var.astype(np.float32)),
    }
    stats = _imported_stats(ctx, shape) if job.stats == "imported" else computed
    parts = [ShardPart.from_json(result) for result in results]
    rows = [len(part.labels) for part in parts]
    counts = {SPLIT: {"rows": sum(rows), "shards": rows}, "shape": list(shape), "flip": job.flip}
    fusion = ctx.inputs["fusion"].read_json("config.json")["model"]
    settings = {"latents": to_json(job), "encoder": to_json(encoder), "fusion": fusion}
    written = [
        *(part.entry for part in parts),
        write_index(ctx.output_uri, SPLIT, parts),
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
