"""Rows of local and remote shards, wherever they are read from."""

import fcntl
import logging
import resource
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from shard_fakes import as_remote, latent_output

from drorae.data import store as store_module
from drorae.data.latent_shards import LatentShards
from drorae.data.order import ShardUse
from drorae.data.shard_cache import ShardCache
from drorae.store import files
from drorae.store.workspace import StageOutput

ROWS = (40, 40, 20)


@pytest.fixture
def local(tmp_path: Path) -> tuple[StageOutput, dict[str, np.ndarray]]:
    return latent_output(tmp_path, ROWS)


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache")


def wait_until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def bodies(cache: ShardCache) -> list[Path]:
    folder = cache.folder
    return [p for p in folder.iterdir() if not p.suffix] if folder.is_dir() else []


def test_local_and_remote_rows_are_the_stored_ones(local, cache, monkeypatch):
    output, columns = local
    ids = np.array([99, 0, 41, 41, 7])
    flip = np.array([True, False, False, True, False])
    expected = np.where(
        flip[:, None, None, None], columns["latent_flip"][ids], columns["latent"][ids]
    )
    near, labels = LatentShards(output).read(ids, flip)
    far, far_labels = LatentShards(as_remote(output, monkeypatch)[0], cache=cache).read(ids, flip)
    np.testing.assert_array_equal(near.numpy(), expected)
    np.testing.assert_array_equal(far.numpy(), expected)
    assert labels.tolist() == far_labels.tolist() == (ids % 3).tolist()


def test_labels_need_the_index_alone(local, cache, monkeypatch):
    output, remote = as_remote(local[0], monkeypatch)
    shards = LatentShards(output, cache=cache)
    assert shards.labels.tolist() == [i % 3 for i in range(100)]
    assert shards.shard_rows == ROWS
    assert sorted(name for name, _, _ in remote.requests) == [
        "latents/counts.json",
        "latents/train/index.arrow",
    ]


def test_few_rows_are_read_by_range_and_many_as_a_whole(local, cache, monkeypatch):
    output, remote = as_remote(local[0], monkeypatch)
    shards = LatentShards(output, cache=cache)
    shards.read(np.array([0, 50]))
    assert not bodies(cache)
    ranges = [(end or 0) - (start or 0) for name, start, end in remote.requests if "part-" in name]
    assert ranges == [36, 36]  # 2 x 3 x 3 float16
    shards.read(np.arange(40))
    assert len(bodies(cache)) == 1
    before = len(remote.requests)
    shards.read(np.arange(40))
    assert len(remote.requests) == before


def test_a_plan_brings_shards_in_its_order_and_the_reader_finds_them(local, cache, monkeypatch):
    output, remote = as_remote(local[0], monkeypatch)
    monkeypatch.setattr(store_module, "DOWNLOADS_AT_ONCE", 1)
    shards = LatentShards(output, cache=cache)
    shards.follow([ShardUse(2, 0, 3), ShardUse(0, 1, 4), ShardUse(1, 2, 5)])
    wait_until(lambda: len(bodies(cache)) == 3)
    order = [name for name, _, _ in remote.requests if "part-" in name]
    assert order == [f"latents/train/part-0000{number}.arrow" for number in (2, 0, 1)]
    shards.read(np.arange(100))
    assert remote.fetched(".arrow") == 4  # the index, and each shard once


def test_passed_shards_make_room_and_those_to_come_wait_for_it(local, tmp_path, monkeypatch):
    output, remote = as_remote(local[0], monkeypatch)
    largest = max(entry.size_bytes for entry in output.manifest.files)
    cache = ShardCache(tmp_path / "cache", limit_bytes=int(1.5 * largest))
    monkeypatch.setattr(store_module, "RETRY_S", 0.02)
    reserve, first = ShardCache._reserve, output.entry("train/part-00000.arrow")

    def slow_for_the_first(cache, entry):
        time.sleep(0.2 * (entry == first))
        return reserve(cache, entry)

    monkeypatch.setattr(ShardCache, "_reserve", slow_for_the_first)
    shards = LatentShards(output, cache=cache)
    shards.follow([ShardUse(0, 0, 3), ShardUse(1, 4, 7)])
    wait_until(lambda: len(bodies(cache)) == 1)
    time.sleep(0.2)
    assert bodies(cache)[0].name == first.sha256
    shards.reached(4)
    second = cache.folder / output.entry("train/part-00001.arrow").sha256
    wait_until(second.is_file)
    assert cache.used_bytes() <= cache.limit_bytes
    shards.read(np.arange(40, 80))
    assert remote.fetched("part-00000.arrow") == remote.fetched("part-00001.arrow") == 1


def test_two_shards_of_a_plan_are_fetched_at_the_same_time(local, tmp_path, monkeypatch):
    output, _ = as_remote(local[0], monkeypatch)
    both = threading.Barrier(2)

    def fetch(uri, start, end):
        both.wait(20)
        return files.read_range(uri, start, end)

    cache = ShardCache(tmp_path / "cache", fetch=fetch)
    LatentShards(output, cache=cache).follow([ShardUse(0, 0, 3), ShardUse(1, 0, 3)])
    wait_until(lambda: len(bodies(cache)) == 2)


def test_what_an_ended_plan_brought_makes_room_for_other_processes(local, tmp_path, monkeypatch):
    output, _ = as_remote(local[0], monkeypatch)
    largest = max(entry.size_bytes for entry in output.manifest.files)
    cache = ShardCache(tmp_path / "cache", limit_bytes=int(1.5 * largest))
    shards = LatentShards(output, cache=cache)
    shards.follow([ShardUse(0, 0, 3)])
    wait_until(lambda: len(bodies(cache)) == 1)
    entry = output.entry("train/part-00001.arrow")
    assert cache.get(output.uri_of(entry.name), entry) is None
    shards.follow(())
    wait_until(lambda: cache.get(output.uri_of(entry.name), entry))


def test_a_shard_that_comes_when_its_rows_were_used_is_let_go(local, cache, monkeypatch):
    output, _ = as_remote(local[0], monkeypatch)
    shards = LatentShards(output, cache=cache)
    may_come, bring = threading.Event(), ShardCache.bring
    monkeypatch.setattr(ShardCache, "bring", lambda *given: may_come.wait(20) and bring(*given))
    shards.follow([ShardUse(0, 0, 3)])
    shards.reached(0)
    time.sleep(0.1)
    shards.reached(4)
    may_come.set()
    wait_until(lambda: len(bodies(cache)) == 1)
    lock = bodies(cache)[0].with_suffix(".lock")
    wait_until(lambda: is_free(lock))


def is_free(lock: Path) -> bool:
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_a_limit_that_cannot_be_held_warns_once_and_reads_rows(
    local, tmp_path, monkeypatch, caplog
):
    output, columns = local
    output, _ = as_remote(output, monkeypatch)
    shards = LatentShards(output, cache=ShardCache(tmp_path / "cache", limit_bytes=100))
    with caplog.at_level(logging.WARNING):
        values, _ = shards.read(np.arange(100))
        shards.read(np.arange(100))
    np.testing.assert_array_equal(values.numpy(), columns["latent"])
    assert caplog.text.count("Raise compute.cache_limit_gb") == 1


def test_local_outputs_follow_no_plan(local):
    shards = LatentShards(local[0])
    shards.follow(iter(lambda: pytest.fail("the plan was read"), None))
    shards.reached(7)


def test_a_local_shard_of_another_size_is_refused(local):
    output, _ = local
    path = Path(output.uri, "train/part-00001.arrow")
    path.write_bytes(path.read_bytes()[:-8])
    shards = LatentShards(output)
    shards.read(np.array([0]))
    with pytest.raises(RuntimeError, match="as its manifest says"):
        shards.read(np.array([50]))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="part-00001"):
        shards.read(np.array([50]))


def test_latents_go_into_the_buffer_that_is_given(local):
    output, columns = local
    shards, out = LatentShards(output), None
    made, _ = shards.read(np.array([3, 4]))
    out = made.new_empty(made.shape)
    assert shards.read(np.array([3, 4]), out=out)[0] is out
    np.testing.assert_array_equal(out.numpy(), columns["latent"][3:5])


def test_what_is_not_stored_is_an_error(local):
    shards = LatentShards(local[0])
    with pytest.raises(IndexError, match="out of range"):
        shards.read(np.array([100]))
    shards.has_flip = False
    with pytest.raises(ValueError, match=r"latents\.flip=true"):
        shards.read(np.array([0]), np.array([True]))


@pytest.mark.parametrize(
    ("soft", "hard", "raised_to", "most"),
    [
        (256, resource.RLIM_INFINITY, 8448, 4096),
        (1024, 4096, 4096, 1920),
        (1024, 1 << 30, 8448, 4096),
        (100_000, 1 << 30, None, 4096),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None, 4096),
    ],
)
def test_the_limit_of_open_files_is_raised_as_far_as_needed(
    monkeypatch, soft, hard, raised_to, most
):
    raised: list[int] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: raised.append(limits[0]))
    assert store_module._max_open_shards() == most
    assert raised == ([raised_to] if raised_to else [])
