"""What a reader finds: candidates (where one image lies) and listings (all candidates of a source).

A candidate is small and plain, because hundreds of thousands of them travel from the driver to the
shard actors.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
)
"""File names that count as images; anything else in a source is not a candidate."""

UNLABELLED = "all"
"""Class name of a source that has no classes."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One image of a source, not yet read."""

    key: str
    """Path inside the source; unique, the same on every machine; sampling and splits hash it."""
    class_name: str
    """Class of the image; empty when the source gives none."""
    split: str
    """`train` or `val` when the source itself says so, else empty."""
    kind: str
    """Reader that can read it: `file`, `tar`, `zip`, `parquet` or `cifar`."""
    container: str
    """URI or path of the file that holds it."""
    index: int = 0
    """Byte offset (tar), row (parquet, cifar) or unused."""
    size_bytes: int = 0
    """Length in bytes (tar) or unused."""
    member: str = ""
    """Name inside the container (zip) or column (parquet)."""

    def to_row(self) -> list[Any]:
        """Plain list for JSON."""
        return list(dataclasses.astuple(self))


@dataclass(frozen=True, slots=True)
class Listing:
    """All candidates of a source, sorted by key, with what could not even be listed."""

    candidates: list[Candidate]
    rejects: list[tuple[str, str]]
    """(key, reason)."""
    class_names: tuple[str, ...] = ()
    """Known class names in label order when the source states them; else empty."""


@dataclass(frozen=True, slots=True)
class Record:
    """One candidate with its content: encoded bytes, RGB pixels [height, width, 3], or an error."""

    candidate: Candidate
    data: bytes | np.ndarray | None
    error: str = ""


def is_image_name(name: str) -> bool:
    """Whether a file name looks like an image; hidden files (`.x`, `._x.jpg`) do not."""
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def printable(name: str) -> str:
    """A file name as valid Unicode: bytes that are none are shown as escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def first_folder(relative: str) -> str:
    """First folder of a relative path, empty when the file lies at the top."""
    head, sign, _ = relative.partition("/")
    return head if sign else ""


def group_by_container(candidates: Sequence[Candidate]) -> Iterator[tuple[str, list[Candidate]]]:
    """Runs of neighbouring candidates of one container, in order."""
    start = 0
    for stop in range(1, len(candidates) + 1):
        if stop == len(candidates) or candidates[stop].container != candidates[start].container:
            yield candidates[start].container, list(candidates[start:stop])
            start = stop


def sort_class_names(names: set[str]) -> list[str]:
    """Class names in label order: by number when all are numbers, else by text."""
    if all(name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)
