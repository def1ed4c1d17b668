"""The cache of a machine: a limit, what may be deleted, what is fetched again, who fetches."""

import hashlib
import logging
import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drorae.data import shard_cache
from drorae.data.shard_cache import OpenShard, ShardCache
from drorae.store import arrivals
from drorae.store.files import FileEntry


class Source:
    """Remote files by name, each as many bytes as given; counts what is read of them."""

    def __init__(self, **sizes: int) -> None:
        self.contents = {name: name.encode() * size for name, size in sizes.items()}
        self.read: Counter[str] = Counter()

    def fetch(self, uri: str, start: int, end: int) -> bytes:
        self.read[uri] += end - start
        return self.contents[uri][start:end]

    def entry(self, name: str) -> FileEntry:
        data = self.contents[name]
        sha256 = hashlib.sha256(data).hexdigest()
        return FileEntry(name=name, size_bytes=len(data), sha256=sha256)


def get(cache: ShardCache, source: Source, name: str) -> OpenShard:
    shard = cache.get(name, source.entry(name))
    assert shard is not None
    assert bytes(shard.data) == source.contents[name]
    return shard


def kept(cache: ShardCache, source: Source) -> str:
    """Names of the shards that are in the cache."""
    return "".join(n for n in source.contents if (cache.folder / source.entry(n).sha256).is_file())


@pytest.fixture
def source() -> Source:
    return Source(a=100, b=100, c=100, d=100)


def cache_of(folder: Path, source: Source, limit_bytes: int = 0) -> ShardCache:
    return ShardCache(folder / "shards", limit_bytes, source.fetch)


def test_a_shard_is_fetched_once_in_parts_and_mapped(tmp_path, source, monkeypatch):
    monkeypatch.setattr(shard_cache, "PART_BYTES", 7)
    cache = cache_of(tmp_path, source)
    first = get(cache, source, "a")
    second = get(cache, source, "a")
    assert source.read == {"a": 100}
    for shard in (first, second):
        shard.close()
    assert sorted(p.suffix for p in cache.folder.iterdir()) == ["", ".lock", ".lock"]


def test_the_least_recently_used_shard_makes_room(tmp_path, source):
    cache = cache_of(tmp_path, source, limit_bytes=250)
    for name in ("a", "b", "a", "c"):
        get(cache, source, name).close()
        time.sleep(0.01)
    assert kept(cache, source) == "ac"
    assert cache.used_bytes() <= 250


def test_open_shards_stay_and_nothing_is_deleted_for_what_does_not_fit(tmp_path, source):
    cache = cache_of(tmp_path, source, limit_bytes=250)
    opened = get(cache, source, "a")
    get(cache, source, "b").close()
    get(cache, source, "c").close()
    assert kept(cache, source) == "ac"
    second = get(cache, source, "c")
    assert cache.get("d", source.entry("d")) is None
    assert kept(cache, source) == "ac"
    second.close()
    get(cache, source, "d")
    assert kept(cache, source) == "ad"
    assert bytes(opened.data) == source.contents["a"]


def test_what_was_handed_out_stays_readable_after_deletion(tmp_path, source):
    cache = cache_of(tmp_path, source, limit_bytes=100)
    shard = get(cache, source, "a")
    rows = shard.data[10:20]
    shard.close()
    get(cache, source, "b")
    assert kept(cache, source) == "b"
    assert bytes(rows) == b"a" * 10


@pytest.mark.parametrize("damage", ["shorter", "changed"])
def test_a_damaged_shard_is_fetched_again_with_a_warning(tmp_path, source, caplog, damage):
    cache = cache_of(tmp_path, source)
    get(cache, source, "a").close()
    path = cache.folder / source.entry("a").sha256
    path.write_bytes(b"a" * 60 if damage == "shorter" else b"x" * 100)
    with caplog.at_level(logging.WARNING):
        get(cache, source, "a")
    assert source.read == {"a": 200}
    assert "fetched again" in caplog.text


def test_another_time_alone_is_looked_into_and_forgiven(tmp_path, source):
    cache = cache_of(tmp_path, source)
    get(cache, source, "a").close()
    os.utime(cache.folder / source.entry("a").sha256)
    get(cache, source, "a")
    assert source.read == {"a": 100}


def test_content_that_is_not_the_entrys_is_refused_and_not_kept(tmp_path, source):
    cache = cache_of(tmp_path, source)
    entry = source.entry("a")
    source.contents["a"] = b"z" * 100
    with pytest.raises(RuntimeError, match="changed or damaged"):
        cache.get("a", entry)
    assert cache.used_bytes() == 0


def test_a_failed_download_leaves_nothing(tmp_path, source):
    def fail(uri: str, start: int, end: int) -> bytes:
        raise FileNotFoundError(uri)

    cache = ShardCache(tmp_path / "shards", 0, fail)
    with pytest.raises(FileNotFoundError):
        cache.get("a", source.entry("a"))
    assert cache.used_bytes() == 0


def test_leftovers_of_the_dead_are_deleted_and_downloads_of_the_living_count(tmp_path, source):
    cache = cache_of(tmp_path, source, limit_bytes=250)
    get(cache, source, "a").close()
    (cache.folder / f"{'0' * 64}.part").write_bytes(b"x" * 90)
    alive = threading.Event(), threading.Event()

    def slow(uri: str, start: int, end: int) -> bytes:
        alive[0].set()
        alive[1].wait()
        return source.fetch(uri, start, end)

    other = ShardCache(cache.folder, 250, slow)
    thread = threading.Thread(target=get, args=(other, source, "b"))
    thread.start()
    alive[0].wait()
    assert not (cache.folder / f"{'0' * 64}.part").exists()
    get(cache, source, "c").close()
    assert kept(cache, source) == "c"
    assert cache.used_bytes() == 200
    alive[1].set()
    thread.join()
    assert kept(cache, source) == "bc"


def test_what_another_download_will_take_of_the_disk_is_not_free(tmp_path, monkeypatch):
    source = Source(a=1 << 20, b=1 << 20)
    cache = cache_of(tmp_path, source)
    free = shutil.disk_usage(tmp_path)._replace(free=3 << 19)
    monkeypatch.setattr(shard_cache.shutil, "disk_usage", lambda folder: free)
    found = []

    def meanwhile(uri: str, start: int, end: int) -> bytes:
        found.append(cache.bring("b", source.entry("b")))
        return source.fetch(uri, start, end)

    other = ShardCache(cache.folder, 0, meanwhile)
    assert other.bring("a", source.entry("a")) == "here"
    assert found == ["full"]


def test_threads_that_want_one_shard_fetch_it_once(tmp_path, source):
    def slow(uri: str, start: int, end: int) -> bytes:
        time.sleep(0.1)
        return source.fetch(uri, start, end)

    cache = ShardCache(tmp_path / "shards", 0, slow)
    threads = [threading.Thread(target=get, args=(cache, source, "a")) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.read == {"a": 100}


def _hold(folder: Path, name: str, ready, end) -> None:
    shard = get(cache_of(folder, Source(a=100)), Source(a=100), name)
    ready.set()
    end.wait()
    shard.close()


def test_a_lock_of_a_killed_process_is_gone(tmp_path, source):
    context = multiprocessing.get_context("spawn")
    ready, end = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, "a", ready, end))
    process.start()
    assert ready.wait(60)
    cache = cache_of(tmp_path, source, limit_bytes=100)
    assert cache.get("b", source.entry("b")) is None
    process.kill()
    process.join()
    get(cache, source, "b")
    assert kept(cache, source) == "b"


def test_a_wait_for_bytes_that_arrive_is_reported(tmp_path, source, monkeypatch):
    monkeypatch.setattr(shard_cache, "PART_BYTES", 10)
    monkeypatch.setattr(arrivals, "STALLED_S", 0.2)
    time.sleep(0.25)
    reports: list[bool] = []

    def slow(uri: str, start: int, end: int) -> bytes:
        time.sleep(0.05 * (start > 0))
        reports.append(arrivals.is_arriving())
        return source.fetch(uri, start, end)

    get(ShardCache(tmp_path / "shards", 0, slow), source, "a")
    assert not reports[0]
    assert all(reports[5:])
    time.sleep(0.25)
    assert not arrivals.is_arriving()


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.integers(1, 120), min_size=2, max_size=6),
    st.integers(50, 300),
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=15),
)
def test_any_sequence_of_uses_holds_the_limit_and_keeps_what_is_open(
    tmp_path_factory, sizes, limit, uses
):
    source = Source(**{f"{number}": size for number, size in enumerate(sizes)})
    cache = cache_of(tmp_path_factory.mktemp("any"), source, limit)
    opened: dict[str, OpenShard] = {}
    for number, stays_open in uses:
        name = str(number % len(sizes))
        shard = cache.get(name, source.entry(name))
        assert cache.used_bytes() <= limit
        held = sum(len(source.contents[n]) for n in opened if n != name)
        if shard is None:
            assert held + len(source.contents[name]) > limit
        elif stays_open and name not in opened:
            opened[name] = shard
        else:
            shard.close()
        assert set(opened) <= set(kept(cache, source))
