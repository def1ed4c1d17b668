"""Opening and walking local folders and object stores, symbolic-link loops included.

Object stores go through fsspec; endpoint and keys come from the usual AWS_* variables. An S3 server
that is away is waited for (`drorae.store.patience`).
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from drorae.store import s3
from drorae.store.errors import clear_errors, is_s3
from drorae.store.patience import patiently


def is_remote(uri: str) -> bool:
    """Whether the place is an object store (has a scheme)."""
    return "://" in uri


def store_errors(uri: str) -> AbstractContextManager[None]:
    """Tell failures of an object store as such, never as a fault of the image being read.

    A refused key or a lost connection becomes a RuntimeError that ends the stage; local errors pass
    as they are.
    """
    return clear_errors(uri) if is_s3(uri) else nullcontext()


def open_file(uri: str) -> Any:
    """Open a local or remote file for random reading.

    Raises:
        FileNotFoundError: Nothing lies there.
        RuntimeError: The object store refused or did not answer.
    """
    if is_remote(uri):
        file_system, path = _remote(uri)
        with store_errors(uri):
            file = patiently(lambda: file_system.open(path, "rb"))
        return _patient(file, uri) if is_s3(uri) else file
    return Path(uri).open("rb")


def _patient(file: Any, uri: str) -> Any:
    """The same open object; whatever asks it for bytes (zipfile, pyarrow) waits for its store."""
    fetch = file.cache.fetcher

    def fetch_patiently(start: int, end: int) -> bytes:
        with store_errors(uri):
            return patiently(lambda: fetch(start, end))

    file.cache.fetcher = fetch_patiently
    return file


def check_exists(uri: str) -> None:
    """Raise a clear error unless a local file or folder is there; remote places are not asked.

    Raises:
        FileNotFoundError: Nothing lies there.
    """
    if not is_remote(uri) and not os.path.exists(uri):
        raise FileNotFoundError(
            f"source {uri!r} does not exist: expected a folder, .tar, .zip or .parquet file, "
            "s3:// place or asset:NAME. Correct shard.source."
        )


def read_range(file: BinaryIO, offset: int, size_bytes: int, uri: str) -> bytes:
    """Read exactly `size_bytes` at an offset of the open file of an address.

    Raises:
        OSError: The file ends before.
        RuntimeError: The object store refused or did not answer.
    """
    with store_errors(uri):
        file.seek(offset)
        data = file.read(size_bytes)
    if len(data) != size_bytes:
        raise OSError(f"file ends {size_bytes - len(data)} bytes early")
    return data


def walk(uri: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Relative names of all files under a folder, and (name, reason) of what cannot be entered.

    Symbolic links are followed; a link that leads to one of its own parents is reported, not
    entered.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: It is a file.
        RuntimeError: The object store refused or did not answer.
    """
    if is_remote(uri):
        return _walk_remote(uri), []
    root = Path(uri)
    check_exists(uri)
    if not root.is_dir():
        raise ValueError(
            f"source {uri!r} is a file of no known kind: expected a folder, .tar, .zip or .parquet "
            "file. Correct shard.source."
        )
    names: list[str] = []
    rejects: list[tuple[str, str]] = []
    for name, reason in _walk_local(root, "", (os.path.realpath(root),)):
        if reason:
            rejects.append((name, reason))
        else:
            names.append(name)
    return sorted(names), sorted(rejects)


def _walk_local(folder: Path, prefix: str, parents: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield prefix.rstrip("/"), f"folder cannot be read: {error.strerror}"
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        yield from _walk_entry(entry, f"{prefix}{entry.name}", parents)


def _walk_entry(
    entry: os.DirEntry[str], name: str, parents: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    if entry.is_symlink() and not os.path.exists(entry.path):
        yield name, "broken symbolic link"
    elif not Path(entry.path).is_dir():
        yield name, ""
    else:
        target = os.path.realpath(entry.path)
        if target in parents:
            yield name, "symbolic link loop"
        else:
            yield from _walk_local(Path(entry.path), f"{name}/", (*parents, target))


def _remote(uri: str) -> tuple[Any, str]:
    if is_s3(uri):
        return s3.filesystem(), uri.removeprefix("s3://")
    return fsspec.core.url_to_fs(uri)


def _walk_remote(uri: str) -> list[str]:
    file_system, root = _remote(uri)
    root = root.rstrip("/")
    with store_errors(uri):
        found = patiently(lambda: file_system.find(root))
    paths = [path for path in found if not path.endswith("/")]
    if not paths:
        raise FileNotFoundError(
            f"source {uri!r} does not exist or is empty: expected objects under that prefix. "
            "Correct shard.source, or AWS_ENDPOINT_URL and the keys."
        )
    names = [path[len(root) :].lstrip("/") for path in paths]
    return sorted(name for name in names if not _is_hidden(name))


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
