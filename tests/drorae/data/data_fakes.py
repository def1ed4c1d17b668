"""Tiny image sources and stage outputs for the tests of drorae.data."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from drorae.config import Compute
from drorae.data.jobs import ShardJob
from drorae.data.shard_map import run_in_process
from drorae.data.sharding import run_shard
from drorae.store.context import StageContext, StageResult
from drorae.store.manifest import Manifest
from drorae.store.workspace import StageOutput


def pixels(seed: int, width: int = 20, height: int = 18) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, image_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def make_folder(root: Path, per_class: int = 4, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            data = encoded(pixels(100 * label + number))
            (root / name / f"{number:03d}.png").write_bytes(data)
    return root


def context(root: Path, stage: str = "shard", inputs: dict | None = None) -> StageContext:
    return StageContext(
        stage=stage,
        key=f"{stage}-key",
        output_uri=str(root / "stages" / stage / "key"),
        inputs=inputs or {},
        compute=Compute(threads_per_worker=1),
    )


def committed(ctx: StageContext, result: StageResult) -> StageOutput:
    manifest = Manifest(
        stage=ctx.stage,
        key=ctx.key,
        version="1",
        config={},
        input_keys={},
        files=tuple(sorted(result.files, key=lambda entry: entry.name)),
        metrics=dict(result.metrics),
        seed=0,
        code_digest="",
        packages={},
        hardware={},
        wall_s=0.0,
        device_hours=0.0,
        attempt=1,
        run_ids={},
        created_at="",
    )
    return StageOutput(uri=ctx.output_uri, manifest=manifest)


def job(source: Path | str, **changes) -> ShardJob:
    fields = {"resolution_px": 16, "rows_per_shard": 3, "val_fraction": 0.3, "min_side_px": 8}
    return ShardJob(source=str(source), **{**fields, **changes})


def shard_output(root: Path, shard: ShardJob) -> StageOutput:
    ctx = context(root)
    return committed(ctx, run_shard(ctx, shard=shard, executor=run_in_process))
