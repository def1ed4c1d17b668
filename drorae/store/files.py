"""Files by address: a local path without a scheme, or s3://bucket/key. Both behave alike.

A write is atomic: a reader sees the old file, the new file or none. Locally that is a temporary
file in the same folder, fsync and rename (`atomic.py`); on S3 an object appears when its upload
completes (`s3.py`). Size and sha256 are computed while writing. An S3 server that is away is waited
for (`patience.py`).
"""

import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from drorae.store import atomic, s3
from drorae.store.errors import clear_errors, is_s3
from drorae.store.patience import patiently

CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file of an output as its manifest records it."""

    name: str
    """Path relative to the stage's output folder, with forward slashes."""
    size_bytes: int
    """Length of the content in bytes."""
    sha256: str
    """Hex digest of the content, computed while it was written."""


def join(uri: str, *names: str) -> str:
    """Append path segments to a local path or s3:// address."""
    return "/".join([uri.rstrip("/") or "/", *(n.strip("/") for n in names if n.strip("/"))])


def exists(uri: str) -> bool:
    """True if a file (not a folder) is there."""
    with clear_errors(uri):
        if is_s3(uri):
            return patiently(lambda: _is_object(uri))
        return os.path.isfile(uri)


def _is_object(uri: str) -> bool:
    # Not `isfile`, which answers False when the server does not answer at all (s3fs 2026.9).
    try:
        return s3.filesystem().info(uri)["type"] == "file"
    except FileNotFoundError:
        return False


def size(uri: str) -> int:
    """Length of a file in bytes.

    Raises:
        FileNotFoundError: If there is none.
    """
    with clear_errors(uri):
        if is_s3(uri):
            return patiently(lambda: int(s3.filesystem().info(uri)["size"]))
        return os.path.getsize(uri)


def read_bytes(uri: str) -> bytes:
    """Whole content of a file.

    Raises:
        FileNotFoundError: If there is none.
    """
    with clear_errors(uri):
        if is_s3(uri):
            return patiently(lambda: s3.filesystem().cat_file(uri))
        return Path(uri).read_bytes()


def read_range(uri: str, start: int, end: int) -> bytes:
    """Bytes `start` up to `end` of a file: one request of exactly that length, nothing read ahead.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If the file ends before `end`.
    """
    if end <= start:
        return b""
    with clear_errors(uri):
        if is_s3(uri):
            data = patiently(lambda: s3.filesystem().cat_file(uri, start=start, end=end))
        else:
            with open(uri, "rb", buffering=0) as source:
                data = os.pread(source.fileno(), end - start, start)
    if len(data) != end - start:
        raise OSError(f"{uri} ends {end - start - len(data)} bytes before byte {end}")
    return data


def read_json(uri: str) -> Any:
    """Parsed JSON file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it holds no JSON.
    """
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise ValueError(
            f"{uri} holds no JSON ({error}): expected a JSON file; rebuild it."
        ) from error


def write_bytes(uri: str, data: bytes) -> FileEntry:
    """Write a file at once, atomically; an older one is replaced.

    Returns:
        The entry under the file's last name; `StageContext` gives names relative to its output.
    """
    if is_s3(uri):
        with clear_errors(uri):
            patiently(lambda: s3.filesystem().pipe_file(uri, data))
    else:
        atomic.replace(uri, [data])
    return FileEntry(
        name=uri.rsplit("/", 1)[-1], size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
    )


def write_with(uri: str, save: Callable[[BinaryIO], None]) -> FileEntry:
    """Write a file through a function that gets an open one, atomically; hashed while written.

    What is too large to lie in memory twice is written so.

    Args:
        uri: Where.
        save: Writes the content from start to end, without seeking; called again after an outage.
    """
    if is_s3(uri):
        with clear_errors(uri):
            hashed = patiently(lambda: _save_s3(uri, save))
    else:
        hashed = atomic.save(uri, lambda target: _hashed_save(target, save))
    return FileEntry(
        name=uri.rsplit("/", 1)[-1], size_bytes=hashed.size_bytes, sha256=hashed.hash.hexdigest()
    )


class _HashedWriter(io.RawIOBase):
    """Passes bytes on to an open file, counted and hashed."""

    def __init__(self, target: BinaryIO):
        self.target = target
        self.hash = hashlib.sha256()
        self.size_bytes = 0
        self.error: Exception | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            self.target.write(data)
        except Exception as error:
            self.error = error
            raise
        self.hash.update(data)
        self.size_bytes += memoryview(data).nbytes
        return memoryview(data).nbytes


def _hashed_save(target: BinaryIO, save: Callable[[BinaryIO], None]) -> _HashedWriter:
    writer = _HashedWriter(target)
    try:
        save(writer)  # pyright: ignore[reportArgumentType] - a raw file, all that `save` may use
    except Exception as error:
        if writer.error is None:
            raise
        # torch.save tells only that it could not write, not why (torch 2.15).
        raise writer.error from error
    return writer


def _save_s3(uri: str, save: Callable[[BinaryIO], None]) -> _HashedWriter:
    target = s3.filesystem().open(uri, "wb", block_size=s3.PART_BYTES)
    try:
        hashed = _hashed_save(target, save)
        target.close()
    except BaseException:
        _abandon(target)
        raise
    return hashed


def _abandon(target: Any) -> None:
    """Give up an upload; close() would complete it and publish half a file."""
    target.closed = True
    with suppress(Exception):  # a server that is away keeps the parts that it has
        target.discard()


def encode_json(value: Any) -> bytes:
    """JSON as this project stores it: sorted keys, indented, final newline.

    Raises:
        ValueError: A number is not finite; says which.
    """
    found = _not_finite(value, "")
    if found:
        raise ValueError(f"{found} is not finite, which JSON cannot hold: expected a number.")
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def encode_log_row(row: Mapping[str, float]) -> bytes:
    """One line of a log of numbers, null for what is not finite."""
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return (json.dumps(finite, allow_nan=False) + "\n").encode()


def _not_finite(value: Any, path: str) -> str:
    """Where the first NaN or infinity lies, with its value; empty without any."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{path}={value}"
    inner = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, list | tuple) else inner
    places = (_not_finite(item, f"{path}.{key}" if path else f"{key}") for key, item in inner)
    return next((place for place in places if place), "")


def write_json(uri: str, value: Any) -> FileEntry:
    """Write a JSON file atomically."""
    return write_bytes(uri, encode_json(value))


def upload(local_path: str | Path, uri: str) -> FileEntry:
    """Copy a local file to an address, atomically; hashed while it is copied.

    Raises:
        FileNotFoundError: If the local file does not exist.
    """
    source = _Hashed(local_path)
    if is_s3(uri):
        with clear_errors(uri):
            patiently(lambda: _upload_s3(source, uri))
    else:
        atomic.replace(uri, source)
    return FileEntry(
        name=uri.rsplit("/", 1)[-1], size_bytes=source.size_bytes, sha256=source.hash.hexdigest()
    )


class _Hashed:
    """The chunks of a local file, counted and hashed as they pass."""

    def __init__(self, path: str | Path):
        self.path = path
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{path} does not exist: expected a file to copy; write it first."
            )

    def __iter__(self) -> Iterator[bytes]:
        self.hash = hashlib.sha256()
        self.size_bytes = 0
        with open(self.path, "rb") as source:
            while chunk := source.read(CHUNK_BYTES):
                self.hash.update(chunk)
                self.size_bytes += len(chunk)
                yield chunk


def _upload_s3(source: _Hashed, uri: str) -> None:
    target = s3.filesystem().open(uri, "wb", block_size=s3.PART_BYTES)
    try:
        for chunk in source:
            target.write(chunk)
        target.close()
    except BaseException:
        _abandon(target)
        raise


def create_exclusive(uri: str, data: bytes) -> bool:
    """Write a file only if none is there; of many callers exactly one gets True."""
    return s3.put_if(uri, data, None) if is_s3(uri) else atomic.create(uri, data)


def list_sizes(uri: str) -> dict[str, int]:
    """Relative name and size in bytes of every file under a folder; empty if there is none."""
    if not is_s3(uri):
        return dict(sorted(_list_local(uri)))
    with clear_errors(uri):
        return dict(sorted(patiently(lambda: _list_s3(uri))))


def list_files(uri: str) -> list[str]:
    """Relative names of the files under a folder, sorted, without unfinished temporary ones."""
    return [n for n in list_sizes(uri) if atomic.TEMPORARY_MARK not in n]


def _list_s3(uri: str) -> list[tuple[str, int]]:
    prefix = join(uri).removeprefix("s3://") + "/"
    return [
        (path.removeprefix(prefix), int(info["size"]))
        for path, info in s3.filesystem().find(uri, detail=True).items()
        if path.startswith(prefix) and not path.endswith("/")
    ]


def _list_local(uri: str) -> Iterator[tuple[str, int]]:
    for folder, _, names in os.walk(uri):
        for name in names:
            path = os.path.join(folder, name)
            with suppress(FileNotFoundError):  # deleted or renamed since the folder was read
                yield os.path.relpath(path, uri).replace(os.sep, "/"), os.path.getsize(path)


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly under a folder, sorted; empty if there is none."""
    with clear_errors(uri):
        try:
            if is_s3(uri):
                rows = patiently(lambda: s3.filesystem().ls(uri, detail=True))
                paths = [r["name"].rstrip("/") for r in rows if r["type"] == "directory"]
                return sorted(p.rsplit("/", 1)[-1] for p in paths)
            return sorted(e.name for e in os.scandir(uri) if e.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []


def delete(uri: str) -> None:
    """Delete one file; no error if it is gone already."""
    with clear_errors(uri), suppress(FileNotFoundError):
        if is_s3(uri):
            patiently(lambda: s3.filesystem().rm_file(uri))
        else:
            os.unlink(uri)


def delete_tree(uri: str) -> None:
    """Delete a folder and all in it; no error if it is gone already."""
    with clear_errors(uri), suppress(FileNotFoundError):
        if is_s3(uri):
            patiently(lambda: s3.filesystem().rm(uri, recursive=True))
        else:
            shutil.rmtree(uri)


def sha256_of(uri: str) -> str:
    """Hex digest of a file's content, read in chunks.

    Raises:
        FileNotFoundError: If there is none.
    """
    total = hashlib.sha256()
    for chunk in read_chunks(uri):
        total.update(chunk)
    return total.hexdigest()


def read_chunks(uri: str) -> Iterator[bytes]:
    """Content of a file in pieces of at most 8 MiB, from start to end.

    Raises:
        FileNotFoundError: If there is none.
    """
    with clear_errors(uri):
        if is_s3(uri):
            client = s3.filesystem()
            source = patiently(lambda: client.open(uri, "rb", cache_type="none"))
        else:
            source = open(uri, "rb")  # noqa: SIM115 - closed by the next line
        with source:
            # A read that fails leaves the position where it was.
            while chunk := patiently(lambda: source.read(CHUNK_BYTES)):
                yield chunk


def default_cache_path() -> Path:
    """Folder for downloads and caches of this user: DRORAE_CACHE or ~/.cache/drorae."""
    return Path(os.environ.get("DRORAE_CACHE") or "~/.cache/drorae").expanduser()


def local_copy(uri: str, cache_path: str | Path | None = None, sha256: str | None = None) -> Path:
    """A local path with a file's content: the path itself, or a verified copy of the S3 object.

    Copies lie under `<cache_path>/objects/<sha256>`, so equal content is fetched once. Without a
    known digest the file is fetched each time.

    Args:
        uri: Local path or s3:// address.
        cache_path: Folder of the cache; None is `default_cache_path()`.
        sha256: Expected hex digest.

    Raises:
        FileNotFoundError: If the file does not exist.
        RuntimeError: If the object's digest is another one.
    """
    if not is_s3(uri):
        if not os.path.isfile(uri):
            raise FileNotFoundError(f"{uri} does not exist: expected a file; check the path.")
        return Path(uri)
    objects = Path(cache_path or default_cache_path()) / "objects"
    if sha256 and (objects / sha256).is_file():
        return objects / sha256
    return _fetch(uri, objects, sha256)


def _fetch(uri: str, objects: Path, sha256: str | None) -> Path:
    found = hashlib.sha256()

    def hashed() -> Iterator[bytes]:
        for chunk in read_chunks(uri):
            found.update(chunk)
            yield chunk

    with clear_errors(str(objects)):
        objects.mkdir(parents=True, exist_ok=True)
        with atomic.temporary(str(objects / "download")) as unfinished:
            atomic.write_through(unfinished, hashed())
            if sha256 and found.hexdigest() != sha256:
                raise RuntimeError(
                    f"{uri} has sha256 {found.hexdigest()}: expected {sha256}; it was changed or "
                    f"damaged, rebuild its stage."
                )
            os.replace(unfinished, objects / found.hexdigest())
    return objects / found.hexdigest()
