"""Temporary folders that do not outlive their owner for long, however it ended.

The owner holds a lock on its folder. The system takes the lock away with the process, by SIGKILL
too, so whoever starts next on this machine can tell what nobody owns and deletes it.
"""

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["scratch_folder"]

PREFIX = "drorae-scratch-"

log = logging.getLogger(__name__)


@contextmanager
def scratch_folder() -> Iterator[str]:
    """A new folder under the system's temporary one; folders of killed owners are deleted first."""
    _delete_ownerless()
    path, lock = _create()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _create() -> tuple[str, int]:
    while True:
        path = tempfile.mkdtemp(prefix=PREFIX)
        lock = _try_lock(path)
        # Another process may take a folder for ownerless before its lock is set.
        if lock is not None and os.path.isdir(path):
            return path, lock
        if lock is not None:
            os.close(lock)


def _delete_ownerless() -> None:
    for entry in os.scandir(tempfile.gettempdir()):
        if not entry.name.startswith(PREFIX):
            continue
        lock = _try_lock(entry.path)
        if lock is not None:
            log.info("deleting %s, which a killed process left", entry.path)
            shutil.rmtree(entry.path, ignore_errors=True)
            os.close(lock)


def _try_lock(path: str) -> int | None:
    """Descriptor of the locked folder; None if it is owned, gone or that of another user."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
