"""Sharding from and to a real object store."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drorae.data.images import ImageShards
from drorae.data.jobs import ShardJob
from drorae.data.shard_cache import ShardCache
from drorae.data.shard_map import run_in_process
from drorae.data.sharding import run_shard
from drorae.store import files
from drorae.store.context import StageContext
from drorae.store.manifest import Manifest
from drorae.store.workspace import StageOutput

pytestmark = pytest.mark.slow


def test_shards_in_a_bucket_equal_local_ones(s3_uri: str, tmp_path: Path):
    rng = np.random.default_rng(0)
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png", "dog/3.png"):
        buffer = io.BytesIO()
        pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, format="PNG")
        files.write_bytes(f"{s3_uri}/photos/{name}", buffer.getvalue())
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(buffer.getvalue())
    outputs = {}
    for root in (s3_uri, str(tmp_path)):
        source = f"{root}/photos"
        ctx = StageContext(stage="shard", key="k", output_uri=f"{root}/stages/shard/k")
        job = ShardJob(source=source, resolution_px=16, rows_per_shard=2, val_fraction=0)
        outputs[root] = ctx, run_shard(ctx, shard=job, executor=run_in_process)
    ctx, result = outputs[s3_uri]
    entries = {e.name: e for e in result.files}
    local = {e.name: e for e in outputs[str(tmp_path)][1].files}
    arrow = [name for name in entries if name.endswith(".arrow")]
    assert len(arrow) == 5  # three shards, two indices
    assert [entries[n] for n in arrow] == [local[n] for n in arrow]
    manifest = Manifest(
        stage="shard",
        key="k",
        version="1",
        config={},
        input_keys={},
        files=tuple(result.files),
        metrics={},
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
    cache = ShardCache(tmp_path / "cache")
    output = StageOutput(uri=ctx.output_uri, manifest=manifest)
    shards = ImageShards(output, "train", cache=cache, keep_bytes=0)
    assert shards.read(np.arange(5))[0].shape == (5, 3, 16, 16)
