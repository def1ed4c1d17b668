"""Atomic writes on a local or mounted file system, for `files.py` and `versioned.py`.

Temporary file in the same folder, fsync, rename, fsync of the folder. A failure leaves no temporary
file behind; a killed process may, which `TEMPORARY_MARK` in the name tells.
"""

import errno
import fcntl
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, TypeVar

from drorae.store.errors import clear_errors

T = TypeVar("T")

TEMPORARY_MARK = ".tmp-"
GUARD_NAME = ".lock"
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def replace(path: str, chunks: Iterable[bytes]) -> None:
    """Write a file from chunks; an older one stays in place until the new one is complete."""
    with clear_errors(path):
        os.makedirs(_folder(path), exist_ok=True)
        with temporary(path) as unfinished:
            write_through(unfinished, chunks)
            os.replace(unfinished, path)
        _sync_folder(path)


def save(path: str, write: Callable[[BinaryIO], T]) -> T:
    """Write a file through a function that gets it open; an older one stays until it is complete.

    Returns:
        What the function returns.
    """
    with clear_errors(path):
        os.makedirs(_folder(path), exist_ok=True)
        with temporary(path) as unfinished:
            with open(unfinished, "xb") as target:
                result = write(target)
                target.flush()
                os.fsync(target.fileno())
            os.replace(unfinished, path)
        _sync_folder(path)
        return result


def create(path: str, data: bytes) -> bool:
    """Write a file only if none is there; of many callers exactly one gets True."""
    with clear_errors(path):
        os.makedirs(_folder(path), exist_ok=True)
        with temporary(path) as unfinished:
            write_through(unfinished, [data])
            created = _link_exclusive(unfinished, path, data)
        _sync_folder(path)
        return created


@contextmanager
def temporary(path: str) -> Iterator[str]:
    """Name for an unfinished file beside `path`; deleted at the end if it is still there."""
    folder, name = os.path.split(path)
    unfinished = os.path.join(folder, f".{name}{TEMPORARY_MARK}{uuid.uuid4().hex[:12]}")
    try:
        yield unfinished
    finally:
        with suppress(FileNotFoundError):
            os.unlink(unfinished)


def write_through(path: str, chunks: Iterable[bytes]) -> None:
    """Write a new file down to the disk, not only into the page cache."""
    with open(path, "xb") as target:
        for chunk in chunks:
            target.write(chunk)
        target.flush()
        os.fsync(target.fileno())


def _sync_folder(path: str) -> None:
    # Without it a power cut may undo the rename of a file that a manifest already names.
    descriptor = os.open(_folder(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link_exclusive(unfinished: str, path: str, data: bytes) -> bool:
    try:
        os.link(unfinished, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # A mount without hard links: exclusive as well, but a reader may see it half written for a
        # moment.
        try:
            write_through(path, [data])
        except FileExistsError:
            return False
    return True


@contextmanager
def guarded(path: str) -> Iterator[None]:
    """Exclude other processes from guarded changes to the files of this folder."""
    # POSIX has no compare-and-swap of a file: one lock file per folder makes read, compare and
    # rename one step.
    with clear_errors(path):
        os.makedirs(_folder(path), exist_ok=True)
        with open(os.path.join(_folder(path), GUARD_NAME), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _folder(path: str) -> str:
    return os.path.dirname(path) or "."
