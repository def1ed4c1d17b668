"""Rows of shards on a real object store: one download by many processes, and after a kill."""

import hashlib
import multiprocessing
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from drorae.data.shard_cache import ShardCache
from drorae.data.shard_format import part_name, write_index, write_latent_shard
from drorae.data.store import ShardStore
from drorae.store import files
from drorae.store.context import StageContext, StageResult
from drorae.store.workspace import StageOutput
from tests.drorae.data.data_fakes import committed

pytestmark = pytest.mark.slow

SPAWN = multiprocessing.get_context("spawn")
ROWS, SHAPE = 60, (8, 16, 16)
ROW_BYTES = 2 * 8 * 16 * 16


@pytest.fixture
def output(s3_uri: str) -> StageOutput:
    """Three shards of one column in a bucket; row i of shard s is filled with s + i / 1000."""
    ctx = StageContext(stage="latents", key="k", output_uri=f"{s3_uri}/stages/latents/k")
    parts = []
    for number in range(3):
        values = (number + np.arange(ROWS) / 1000).astype(np.float16)
        rows = np.broadcast_to(values[:, None, None, None], (ROWS, *SHAPE))
        labels, name = np.full(ROWS, number), part_name("train", number)
        part = write_latent_shard(ctx.output_uri, name, {"latent": rows}, labels, number * ROWS)
        parts.append(part)
    entries = [*(part.entry for part in parts), write_index(ctx.output_uri, "train", parts)]
    return committed(ctx, StageResult(files=entries))


class Counted:
    """`files.read_range` that counts the bytes of each file in a log that processes share."""

    def __init__(self, log: Path, pause_s: float = 0.0) -> None:
        self.log, self.pause_s = log, pause_s

    def __call__(self, uri: str, start: int, end: int) -> bytes:
        with self.log.open("a") as log:
            log.write(f"{uri.rsplit('/', 1)[-1]} {end - start}\n")
        if self.pause_s:
            SPAWN.Event().wait(self.pause_s)
        return files.read_range(uri, start, end)

    def bytes_of(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for line in self.log.read_text().splitlines() if self.log.exists() else ():
            name, size = line.split()
            found[name] += int(size)
        return found


def read_all(output: StageOutput, cache: ShardCache, sums) -> None:
    store = ShardStore(output, "train", cache)
    digest = hashlib.sha256()
    for shard in range(3):
        start = store.index.offsets[shard]["latent"]
        places = [(shard, start + row * ROW_BYTES, ROW_BYTES) for row in range(ROWS)]
        for data in store.read(places):
            digest.update(data)
    sums.put(digest.hexdigest())


def expected_sum(output: StageOutput) -> str:
    digest = hashlib.sha256()
    for number in range(3):
        values = (number + np.arange(ROWS) / 1000).astype(np.float16)
        digest.update(np.repeat(values, ROW_BYTES // 2).tobytes())
    return digest.hexdigest()


def sizes(output: StageOutput) -> dict[str, int]:
    return {
        entry.name.rsplit("/", 1)[-1]: entry.size_bytes
        for entry in output.manifest.files
        if "part-" in entry.name
    }


def test_four_processes_fetch_every_shard_once(output, s3_environment, tmp_path):
    fetch = Counted(tmp_path / "log", pause_s=0.2)
    cache = ShardCache(tmp_path / "cache", 0, fetch)
    sums = SPAWN.Queue()
    processes = [SPAWN.Process(target=read_all, args=(output, cache, sums)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [sums.get(timeout=240) for _ in processes]
    for process in processes:
        process.join()
    assert set(found) == {expected_sum(output)}
    # Beside the whole shards, each process may have read a tenth of them row by row.
    for name, size in sizes(output).items():
        assert size <= fetch.bytes_of()[name] <= size * (1 + 4 * 0.1)


def test_a_limit_is_held_while_all_is_read(output, tmp_path):
    fetch = Counted(tmp_path / "log")
    limit = 2 * max(sizes(output).values())
    cache = ShardCache(tmp_path / "cache", limit, fetch)
    sums = SPAWN.Queue()
    for _ in range(2):
        read_all(output, cache, sums)
        assert sums.get(timeout=60) == expected_sum(output)
        assert 0 < cache.used_bytes() <= limit


def test_a_row_by_range_equals_the_mapped_row_and_labels_cost_no_shard(output, tmp_path):
    fetch = Counted(tmp_path / "log")
    store = ShardStore(output, "train", ShardCache(tmp_path / "cache", 0, fetch))
    assert store.index.labels.tolist() == [0] * ROWS + [1] * ROWS + [2] * ROWS
    assert not fetch.bytes_of()
    place = (1, store.index.offsets[1]["latent"] + 7 * ROW_BYTES, ROW_BYTES)
    by_range = bytes(store.read([place])[0])
    assert fetch.bytes_of() == {"part-00001.arrow": ROW_BYTES}
    assert store.bring(1) == "here"
    assert bytes(store.read([place])[0]) == by_range


def fetch_one(output: StageOutput, cache: ShardCache, started) -> None:
    started.set()
    entry = output.entry(part_name("train", 0))
    cache.get(output.uri_of(entry.name), entry)


def test_a_download_whose_process_is_killed_is_done_by_another(output, s3_environment, tmp_path):
    slow = ShardCache(tmp_path / "cache", 0, Counted(tmp_path / "slow", pause_s=600))
    started = SPAWN.Event()
    process = SPAWN.Process(target=fetch_one, args=(output, slow, started))
    process.start()
    assert started.wait(120)
    deadline = 600
    while not list(slow.folder.glob("*.part")) and deadline:
        SPAWN.Event().wait(0.1)
        deadline -= 1
    cache = ShardCache(slow.folder, 0, Counted(tmp_path / "log"))
    entry = output.entry(part_name("train", 0))
    assert cache.bring(output.uri_of(entry.name), entry) == "busy"
    process.kill()
    process.join()
    shard = cache.get(output.uri_of(entry.name), entry)
    assert shard is not None
    assert hashlib.sha256(shard.data).hexdigest() == entry.sha256
    assert not list(cache.folder.glob("*.part"))


def test_a_damaged_copy_is_fetched_again(output, tmp_path, caplog):
    fetch = Counted(tmp_path / "log")
    cache = ShardCache(tmp_path / "cache", 0, fetch)
    entry = output.entry(part_name("train", 2))
    shard = cache.get(output.uri_of(entry.name), entry)
    assert shard is not None
    shard.close()
    path = cache.folder / entry.sha256
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    again = cache.get(output.uri_of(entry.name), entry)
    assert again is not None
    assert hashlib.sha256(again.data).hexdigest() == entry.sha256
    assert "fetched again" in caplog.text
    assert fetch.bytes_of()["part-00002.arrow"] == 2 * entry.size_bytes
