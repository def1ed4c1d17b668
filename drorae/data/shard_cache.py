"""Copies of remote shards in a folder of this machine, shared by all of its processes.

`<folder>/<sha256>` is a shard, `<sha256>.part` one that is being fetched, `<sha256>.lock` what
processes lock (flock; the kernel drops it when a process dies, however that happens): exclusively
to fetch or to delete, shared while the shard is mapped. So a shard is fetched once by a machine and
deleted only while nobody uses it. The time of the lock file is the last use, by which the least
recently used shard makes room. A complete shard has a fixed time of its own, which any later write
changes: another time or size means that its content is checked again.
"""

import fcntl
import hashlib
import logging
import mmap
import os
import shutil
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from drorae.config import Compute
from drorae.store import arrivals, files
from drorae.store.errors import clear_errors
from drorae.store.files import FileEntry

log = logging.getLogger(__name__)

Fetch = Callable[[str, int, int], bytes]
"""Reads a part of a file: address, first byte, end (`files.read_range`)."""

Outcome = Literal["here", "busy", "full"]
"""Of an attempt to have a shard in the cache: it is there; another process fetches it; all that
fills the cache is in use."""

COMPLETE_NS = 10**9 * 978_307_200
"""Modification time of a complete shard: 2001-01-01."""
PART_BYTES = 8 * 2**20
"""Bytes of one request; with `PARTS_AT_ONCE` what a download holds in memory."""
PARTS_AT_ONCE = 4
"""Requests of one download that run at the same time."""
SHARED, EXCLUSIVE = fcntl.LOCK_SH | fcntl.LOCK_NB, fcntl.LOCK_EX | fcntl.LOCK_NB

POLL_S = 0.05
"""How often a process that waits for the download of another one looks."""


class Lock:
    """A held lock of an open file; let go by `close`, with the object, or with the process.

    Args:
        descriptor: The open file.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.close = weakref.finalize(self, os.close, descriptor)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class OpenShard:
    """A local shard, mapped; nobody deletes it before `close` or the end of the process.

    Args:
        file: The open shard.
        lock: Its shared lock; none: a file of a local workspace, which nobody deletes.
    """

    def __init__(self, file: BinaryIO, lock: "Lock | None") -> None:
        self._lock = lock
        self.data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        """The whole file. Stays valid for whom it was handed out to."""

    def close(self) -> None:
        """Let others delete it."""
        if self._lock is not None:
            self._lock.close()


@dataclass(frozen=True, slots=True)
class ShardCache:
    """Shards by content, at most so many bytes of them.

    Args:
        folder: A folder of this machine; made at first use.
        limit_bytes: Most bytes that lie there, unfinished downloads included; 0: as the disk has.
        fetch: Reads a part of a remote file.
    """

    folder: Path
    limit_bytes: int = 0
    fetch: Fetch = files.read_range

    def find(self, entry: FileEntry) -> OpenShard | None:
        """The shard if it is here and undamaged, without waiting for anything."""
        lock = _locked(self._path(entry, ".lock"), SHARED)
        if lock is None:
            return None
        if not self._is_complete(entry):
            lock.close()
            return None
        os.utime(lock.descriptor)
        with self._path(entry).open("rb") as file:
            return OpenShard(file, lock)

    def get(self, uri: str, entry: FileEntry) -> OpenShard | None:
        """The shard, fetched first if need be; none: all that fills the cache is in use.

        Waits for another process that fetches it already.

        Raises:
            FileNotFoundError: The remote file does not exist.
            RuntimeError: Its content is not that of the entry, or it cannot be read.
        """
        with arrivals.awaited():
            while (shard := self.find(entry)) is None:
                outcome = self.bring(uri, entry)
                if outcome == "full":
                    return None
                if outcome == "busy":
                    self._wait_for_other(entry)
            return shard

    def bring(
        self, uri: str, entry: FileEntry, reserved: Callable[[], None] = lambda: None
    ) -> Outcome:
        """Fetch the shard unless it is here, another process is at it, or there is no room.

        Args:
            uri: Its address.
            entry: Its content.
            reserved: Called when it has room, before it is fetched.

        Raises:
            FileNotFoundError: The remote file does not exist.
            RuntimeError: Its content is not that of the entry, or it cannot be read.
        """
        lock = _locked(self._path(entry, ".lock"), EXCLUSIVE)
        if lock is None:
            # Mapped by others, or about to be; `find` succeeds then.
            return "here" if self._is_complete(entry) else "busy"
        with lock, clear_errors(str(self.folder)):
            if self._is_complete(entry) or self._is_repaired(uri, entry):
                return "here"
            if not self._reserve(entry):
                return "full"
            reserved()
            self._download(uri, entry)
            os.utime(lock.descriptor)
            return "here"

    def used_bytes(self) -> int:
        """Bytes of all shards and unfinished downloads; grows with their number."""
        return sum(_size_of(item.path) for item in _items(self.folder, ".lock"))

    def _path(self, entry: FileEntry, suffix: str = "") -> Path:
        return self.folder / f"{entry.sha256}{suffix}"

    def _is_complete(self, entry: FileEntry) -> bool:
        try:
            found = self._path(entry).stat()
        except FileNotFoundError:
            return False
        return found.st_size == entry.size_bytes and found.st_mtime_ns == COMPLETE_NS

    def _is_repaired(self, uri: str, entry: FileEntry) -> bool:
        """Whether a shard with another time has the right content after all; else it is deleted."""
        path = self._path(entry)
        if not path.is_file():
            return False
        has_size = path.stat().st_size == entry.size_bytes
        if has_size and files.sha256_of(str(path)) == entry.sha256:
            os.utime(path, ns=(COMPLETE_NS, COMPLETE_NS))
            return True
        log.warning("%s, the copy of %s, was changed or damaged; it is fetched again.", path, uri)
        path.unlink()
        return False

    def _reserve(self, entry: FileEntry) -> bool:
        """Make an empty file of the size to come, if others can be deleted as far as needed."""
        part = self._path(entry, ".part")
        with _lock_file(self.folder / "room.lock") as room:
            fcntl.flock(room.descriptor, fcntl.LOCK_EX)
            part.unlink(missing_ok=True)
            self._delete_leftovers()
            missing = entry.size_bytes - self._room()
            if missing > 0 and not self._make_room(missing):
                return False
            with part.open("wb") as file:
                file.truncate(entry.size_bytes)
        return True

    def _room(self) -> int:
        free = shutil.disk_usage(self.folder).free - self._owed_bytes()
        return min(free, self.limit_bytes - self.used_bytes()) if self.limit_bytes else free

    def _owed_bytes(self) -> int:
        """Disk space that is free now and that downloads under way will take."""
        parts = [item.path for item in _items(self.folder) if item.name.endswith(".part")]
        return sum(max(0, _size_of(part) - _written_bytes(part)) for part in parts)

    def _make_room(self, missing: int) -> bool:
        """Delete the least recently used shards that nobody has open; nothing if too few are."""
        with _Victims() as victims:
            for path in self._by_last_use():
                lock = _locked(path.with_suffix(".lock"), EXCLUSIVE)
                if lock is not None:
                    missing -= victims.add(path, lock)
                if missing <= 0:
                    victims.delete()
                    return True
        return False

    def _by_last_use(self) -> list[Path]:
        shards = [Path(item.path) for item in _items(self.folder, ".lock", ".part")]
        return sorted(shards, key=lambda path: (_last_use_ns(path), path.name))

    def _delete_leftovers(self) -> None:
        """Unfinished downloads of processes that are gone."""
        for item in _items(self.folder, ".lock"):
            path = Path(item.path)
            if path.suffix == ".part" and (lock := _locked(path.with_suffix(".lock"), EXCLUSIVE)):
                with lock:
                    path.unlink(missing_ok=True)

    def _download(self, uri: str, entry: FileEntry) -> None:
        part, digest = self._path(entry, ".part"), hashlib.sha256()
        try:
            with part.open("r+b") as target:
                for data in self._parts(uri, entry.size_bytes):
                    digest.update(data)
                    target.write(data)
                    arrivals.note()
                target.flush()
                os.fsync(target.fileno())
            if digest.hexdigest() != entry.sha256:
                raise RuntimeError(
                    f"{uri} has sha256 {digest.hexdigest()}: expected {entry.sha256}; it was "
                    "changed or damaged, rebuild its stage."
                )
            os.utime(part, ns=(COMPLETE_NS, COMPLETE_NS))
            part.replace(self._path(entry))
        finally:
            part.unlink(missing_ok=True)

    def _parts(self, uri: str, size: int) -> Iterator[bytes]:
        """The content in order; the next requests are under way while one part is used."""
        starts = iter(range(0, size, PART_BYTES))
        running: deque[Future[bytes]] = deque()
        with ThreadPoolExecutor(PARTS_AT_ONCE, thread_name_prefix="fetch") as pool:
            try:
                while True:
                    for start in starts:
                        end = min(start + PART_BYTES, size)
                        running.append(pool.submit(self.fetch, uri, start, end))
                        if len(running) == PARTS_AT_ONCE:
                            break
                    if not running:
                        return
                    yield running.popleft().result()
            finally:
                for request in running:
                    request.cancel()

    def _wait_for_other(self, entry: FileEntry) -> None:
        """Wait a moment; what the other process has received in it counts as arriving here."""
        before = _written_bytes(self._path(entry, ".part"))
        time.sleep(POLL_S)
        if _written_bytes(self._path(entry, ".part")) != before:
            arrivals.note()


class _Victims:
    """Shards that are locked for deletion; context manager, whose end lets them go."""

    def __init__(self) -> None:
        self._locked: list[tuple[Path, Lock]] = []

    def __enter__(self) -> "_Victims":
        return self

    def __exit__(self, *error: object) -> None:
        for _, lock in self._locked:
            lock.close()

    def add(self, path: Path, lock: Lock) -> int:
        self._locked.append((path, lock))
        return _size_of(path)

    def delete(self) -> None:
        for path, _ in self._locked:
            path.unlink(missing_ok=True)  # gone if it was found damaged since the folder was read


def node_cache(compute: Compute) -> ShardCache:
    """The cache that a configuration names: below `cache_path`, else the user's."""
    folder = Path(compute.cache_path or files.default_cache_path())
    return ShardCache(folder / "shards", int(compute.cache_limit_gb * 1e9))


def _locked(path: Path, kind: int) -> Lock | None:
    """The lock of that kind, or none if another process or thread has one that conflicts."""
    with clear_errors(str(path)):
        lock = _lock_file(path)
        try:
            fcntl.flock(lock.descriptor, kind)
        except BlockingIOError:
            lock.close()
            return None
        return lock


def _lock_file(path: Path) -> Lock:
    path.parent.mkdir(parents=True, exist_ok=True)
    return Lock(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))


def _items(folder: Path, *without: str) -> list[os.DirEntry[str]]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as items:
        return [item for item in items if not item.name.endswith(without)]


def _size_of(path: str | Path) -> int:
    with suppress(FileNotFoundError):  # finished or given up since the folder was read
        return os.stat(path).st_size
    return 0


def _last_use_ns(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.with_suffix(".lock").stat().st_mtime_ns
    return 0


def _written_bytes(path: str | Path) -> int:
    """Disk space of a file, which grows while it is filled."""
    with suppress(FileNotFoundError):
        return os.stat(path).st_blocks * 512  # whatever the file system's own blocks are
    return 0
