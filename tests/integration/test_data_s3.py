"""Sharding from and to a real object store: equal bytes, and what it costs in requests."""

import io
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from drorae.data.images import ImageShards
from drorae.data.jobs import ShardJob
from drorae.data.readers.candidates import to_candidates
from drorae.data.readers.source import list_source, read_records
from drorae.data.shard_cache import ShardCache
from drorae.data.shard_map import run_in_process
from drorae.data.sharding import run_shard
from drorae.store import errors, files, s3
from drorae.store.context import StageContext, StageResult
from tests.drorae.data.data_fakes import committed

pytestmark = pytest.mark.slow


def make_photos(root: str, count: int) -> str:
    rng = np.random.default_rng(0)
    for number in range(count):
        buffer = io.BytesIO()
        pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, format="PNG")
        name = f"{('cat', 'dog')[number % 2]}/{number:03d}.png"
        files.write_bytes(f"{root}/photos/{name}", buffer.getvalue())
    return f"{root}/photos"


def shard(root: str, source: str, **changes: Any) -> StageResult:
    ctx = StageContext(stage="shard", key="k", output_uri=f"{root}/stages/shard/k")
    job = ShardJob(source=source, resolution_px=16, val_fraction=0, **changes)
    return run_shard(ctx, shard=job, executor=run_in_process)


@contextmanager
def counted_requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Requests to the store by method, and under `bytes` what the answers of `get_object` held."""
    client, lock = s3.filesystem(), threading.Lock()
    counts: Counter[str] = Counter()
    ask = client._call_s3

    async def counting(method: str, *args: Any, **kwargs: Any) -> Any:
        reply = await ask(method, *args, **kwargs)
        with lock:
            counts[method] += 1
            if method == "get_object":
                counts["bytes"] += int(reply["ContentLength"])
        return reply

    with monkeypatch.context() as patch:
        patch.setattr(client, "_call_s3", counting)
        yield counts


ODD_NAMES = ("cat/0?.png", "cat/1#.png", "cat/2%20.png", "cat/3 é.png", "dog/4?versionId=1.png")


def test_objects_with_odd_names_are_listed_and_read(s3_uri: str):
    source = make_photos(s3_uri, 5)
    for number, name in enumerate(ODD_NAMES):
        old = f"{source}/{('cat', 'dog')[number % 2]}/{number:03d}.png"
        bucket, key = errors.split(f"{source}/{name}")
        s3.filesystem().call_s3("put_object", Bucket=bucket, Key=key, Body=files.read_bytes(old))
        files.delete(old)
    listing = list_source(source)
    assert sorted(listing.table["key"].to_pylist()) == sorted(ODD_NAMES[:4])
    assert listing.rejects[0][0] == ODD_NAMES[4]
    assert listing.class_names == ("cat",)
    records = list(read_records(to_candidates(listing.table)))
    assert [record.error for record in records] == [""] * 4


@pytest.mark.parametrize("pictures", ["square", "source"])
def test_shards_in_a_bucket_equal_local_ones(s3_uri: str, tmp_path: Path, pictures: str):
    results = {}
    for root in (s3_uri, str(tmp_path)):
        source = make_photos(root, 5)
        results[root] = shard(root, source, rows_per_shard=2, pictures=pictures)
    entries, local = (
        {e.name: e for e in results[root].files if e.name.endswith(".arrow")}
        for root in (s3_uri, str(tmp_path))
    )
    assert len(entries) == 5
    assert entries == local
    ctx = StageContext(stage="shard", key="k", output_uri=f"{s3_uri}/stages/shard/k")
    output = committed(ctx, results[s3_uri])
    shards = ImageShards(output, "train", cache=ShardCache(tmp_path / "cache"))
    assert shards.read(np.arange(5))[0].shape == (5, 3, 16, 16)


def test_an_image_is_read_twice_and_a_rerun_reads_none(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    count = 300
    source = make_photos(s3_uri, count)
    size = sum(files.list_sizes(source).values())
    job = {"rows_per_shard": 64, "pictures": "source", "max_train_images": count}
    with counted_requests(monkeypatch) as first:
        result = shard(s3_uri, source, **job)
    with counted_requests(monkeypatch) as again:
        assert shard(s3_uri, source, **job).files == result.files
    tasks = 3 + 5  # chunks of 128 images, shards of 64
    # Each image, the rows of each task's plan, and what a stage reads in any case.
    assert first["get_object"] <= 2 * count + tasks + 5
    assert first["bytes"] < 2 * size + 400 * count
    # Nothing is read but the results, in bundles; listings of two classes and of the markers.
    assert again["get_object"] <= 4
    assert again["list_objects_v2"] <= first["list_objects_v2"] <= 10
    assert again["put_object"] <= 20


def test_squares_are_written_once_and_read_by_range(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = make_photos(s3_uri, 200)
    size = sum(files.list_sizes(source).values())
    with counted_requests(monkeypatch) as counts:
        result = shard(s3_uri, source, rows_per_shard=50)
    stored = sum(e.size_bytes for e in result.files if "part-" in e.name)
    # 200 files; the 4 shards take neighbouring rows of 2 packs in a request each.
    assert counts["get_object"] <= 200 + 4 * 2 + 6 + 5
    assert counts["bytes"] < size + stored + 400 * 200
