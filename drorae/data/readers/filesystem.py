"""Opening and walking local folders and object stores, symbolic-link loops included.

Object stores go through fsspec; endpoint and keys come from the usual AWS_* variables. An S3 server
that is away is waited for (`drorae.store.patience`).
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import fsspec

from drorae.data.readers.candidates import is_hidden_name
from drorae.store import s3
from drorae.store.errors import clear_errors, is_s3
from drorae.store.patience import patiently

LISTING_THREADS = 16
"""Folders or containers listed at the same time; listing waits for the store, not for a CPU."""

AMBIGUOUS = "?versionId= or //, which S3 clients read in different ways"

ListingProgress = Callable[[int, int], None]
"""Called with (folders or containers listed, in all)."""


def ignore_progress(done: int, total: int) -> None:
    """A `ListingProgress` that nobody sees."""


def is_remote(uri: str) -> bool:
    """Whether the place is an object store (has a scheme)."""
    return "://" in uri


def store_errors(uri: str) -> AbstractContextManager[None]:
    """Tell failures of an object store as such, never as a fault of the image being read.

    A refused key or a lost connection becomes a RuntimeError that ends the stage; local errors pass
    as they are.
    """
    if is_s3(uri):
        return clear_errors(uri)
    return _clear_remote_errors(uri) if is_remote(uri) else nullcontext()


@contextmanager
def _clear_remote_errors(uri: str) -> Iterator[None]:
    """The same for other stores of fsspec, each of which has errors of its own."""
    try:
        yield
    except (FileNotFoundError, RuntimeError):
        raise
    except ImportError as error:
        raise RuntimeError(
            f"{uri} cannot be read: {error}; expected the package that fsspec needs for such "
            "addresses. Install it, or correct the address."
        ) from error
    except Exception as error:
        raise RuntimeError(
            f"{uri} cannot be read ({type(error).__name__}: {error}): expected an answer. Check "
            "the address, the network, and the keys of that store (HF_TOKEN for hf://)."
        ) from error


def open_file(uri: str, read_ahead_bytes: int = 0) -> Any:
    """Open a local or remote file for random reading.

    Args:
        uri: Where it lies.
        read_ahead_bytes: What a remote file fetches beyond each read; 0 for reads here and there.

    Raises:
        FileNotFoundError: Nothing lies there.
        RuntimeError: The object store refused or did not answer.
    """
    if not is_remote(uri):
        return Path(uri).open("rb")
    cache = {"cache_type": "readahead", "block_size": read_ahead_bytes}
    options: dict[str, Any] = cache if read_ahead_bytes else {"cache_type": "none"}
    with store_errors(uri):
        file_system, path = _remote(uri)
        file = patiently(lambda: file_system.open(path, "rb", **options))
    return _patient(file, uri) if hasattr(file, "cache") else file


def read_content(uri: str, start: int = 0, end: int | None = None) -> bytes:
    """A file, or its bytes `start` up to `end` or to its end; of a remote one in one request.

    Raises:
        OSError: It cannot be read.
        RuntimeError: The object store refused or did not answer.
    """
    if is_remote(uri):
        limits = {} if end is None else {"start": start, "end": end}
        with store_errors(uri):
            file_system, path = _remote(uri)
            return patiently(lambda: file_system.cat_file(path, **limits))
    with open(uri, "rb", buffering=0) as file:
        if end is None:
            return file.read()
        # A damaged length must not reserve memory for what is not there.
        end = min(end, os.fstat(file.fileno()).st_size)
        return os.pread(file.fileno(), max(end - start, 0), start)


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


def is_folder(uri: str) -> bool:
    """Whether a local path is a folder, or objects lie below a remote one: a request.

    Raises:
        RuntimeError: The object store refused or did not answer.
    """
    if not is_remote(uri):
        return os.path.isdir(uri)
    if is_s3(uri):
        return any(page.objects for page in s3.list_pages(f"{uri.rstrip('/')}/"))
    with store_errors(uri):
        file_system, path = _remote(uri)
        return file_system.isdir(path)


def walk(
    uri: str, on_progress: ListingProgress = ignore_progress
) -> tuple[list[str], list[tuple[str, str]]]:
    """Relative names of all files under a folder, and (name, reason) of what cannot be entered.

    Symbolic links are followed; a link that leads to one of its own parents is reported, not
    entered. Grows by a name (about 80 bytes) a file; on S3 a request lists 1,000 objects, and the
    folders directly under `uri` are listed at the same time.

    Args:
        uri: The folder.
        on_progress: Called with (folders done, folders in all) of those directly under it.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: It is a file.
        RuntimeError: The object store refused or did not answer.
    """
    if is_remote(uri):
        return _walk_remote(uri, on_progress)
    root = Path(uri)
    check_exists(uri)
    if not root.is_dir():
        raise ValueError(
            f"source {uri!r} is a file of no known kind: expected a folder, .tar, .zip or .parquet "
            "file. Correct shard.source."
        )
    names: list[str] = []
    rejects: list[tuple[str, str]] = []
    for name, reason in _walk_local(root, "", (os.path.realpath(root),), on_progress):
        if reason:
            rejects.append((name, reason))
        else:
            names.append(name)
    return sorted(names), sorted(rejects)


def _walk_local(
    folder: Path,
    prefix: str,
    parents: tuple[str, ...],
    on_progress: ListingProgress = ignore_progress,
) -> Iterator[tuple[str, str]]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield prefix.rstrip("/"), f"folder cannot be read: {error.strerror}"
        return
    for number, entry in enumerate(entries, 1):
        if not is_hidden_name(entry.name):
            yield from _walk_entry(entry, f"{prefix}{entry.name}", parents)
        on_progress(number, len(entries))


def _walk_entry(
    entry: os.DirEntry[str], name: str, parents: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    if entry.is_symlink() and not os.path.exists(entry.path):
        yield name, "broken symbolic link"
    elif entry.is_file():  # known from the listing of its folder: no request a file
        yield name, ""
    elif not entry.is_dir():  # whoever opens a pipe waits for its other end
        yield name, "a device, a pipe or a socket, not a file"
    else:
        target = os.path.realpath(entry.path)
        if target in parents:
            yield name, "symbolic link loop"
        else:
            yield from _walk_local(Path(entry.path), f"{name}/", (*parents, target))


def _remote(uri: str) -> tuple[Any, str]:
    if is_s3(uri):
        if not _is_unambiguous(uri.removeprefix("s3://").rstrip("/")):
            raise ValueError(f"{uri!r} holds {AMBIGUOUS}: rename what lies there.")
        return s3.filesystem(), uri.removeprefix("s3://")
    return fsspec.core.url_to_fs(uri)


def _is_unambiguous(key: str) -> bool:
    return "?versionId=" not in key and "//" not in key and not key.startswith("/")


def _walk_remote(uri: str, on_progress: ListingProgress) -> tuple[list[str], list[tuple[str, str]]]:
    if is_s3(uri):
        names = [name for name, _, _ in objects_on_s3(uri, on_progress)]
    else:
        with store_errors(uri):
            file_system, root = _remote(uri)
            root = root.rstrip("/")
            names = [path[len(root) + 1 :] for path in file_system.find(root)]
    names = [name for name in names if name and not name.endswith("/")]
    if not names:
        raise FileNotFoundError(
            f"source {uri!r} does not exist or is empty: expected objects under that prefix. "
            "Correct shard.source, or AWS_ENDPOINT_URL and the keys."
        )
    visible = sorted(name for name in names if not _is_hidden(name))
    if not is_s3(uri):
        return visible, []
    unclear = [name for name in visible if not _is_unambiguous(name)]
    refused = [(name, f"the key holds {AMBIGUOUS}: rename the object") for name in unclear]
    return [name for name in visible if _is_unambiguous(name)], refused


def objects_on_s3(
    uri: str, on_progress: ListingProgress = ignore_progress
) -> Iterator[tuple[str, int, str]]:
    """Relative name, size and ETag of all objects under a folder; arguments as `walk`."""
    root = uri.rstrip("/")
    folders: list[str] = []
    for page in s3.list_pages(f"{root}/", by_folder=True):
        yield from page.objects
        folders += page.folders

    def inside(folder: str) -> list[tuple[str, int, str]]:
        pages = s3.list_pages(f"{root}/{folder}")
        return [
            (f"{folder}{name}", size, etag) for page in pages for name, size, etag in page.objects
        ]

    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        for done, objects in enumerate(pool.map(inside, folders), 1):
            yield from objects
            on_progress(done, len(folders))


def _is_hidden(name: str) -> bool:
    return any(map(is_hidden_name, name.split("/")))
