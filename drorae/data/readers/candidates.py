"""What a reader finds: candidates (where one image lies) and listings (all candidates of a source).

A listing is an Arrow table, because it holds millions of images: names, classes and containers that
repeat are stored once. A `Candidate` is one row of it, made where the image is read.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from posixpath import splitext
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from drorae.data.formats import IMAGE_SUFFIXES

UNLABELLED = "all"
"""Class name of a source that has no classes."""

MAX_DIGITS = 100
"""Longest number that is one; longer ones are names."""

_REPEATED = pa.dictionary(pa.int32(), pa.string())

LISTING_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "class_name": _REPEATED,
        "split": _REPEATED,
        "kind": _REPEATED,
        # Names of files may be no Unicode.
        "container": pa.dictionary(pa.int32(), pa.binary()),
        "index": pa.int64(),
        "size_bytes": pa.int64(),
        "member": pa.binary(),
        "unit": pa.int32(),
    }
)
"""Columns of a listing, as in `Candidate`."""


SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN"})
"""Of macOS in archives, of Synology (previews of every picture), and of Windows."""


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
    """URI or path of the file that holds it, or of the folder in which the file lies."""
    index: int = 0
    """Byte offset (tar, zip), row (parquet, cifar) or unused."""
    size_bytes: int = 0
    """Bytes stored in the container (tar, zip) or unused."""
    member: str = ""
    """Name inside the container (file, zip), map of a sparse member (tar) or column (parquet)."""
    unit: int = 0
    """Rows of one unit of a container are only read together: its row group (parquet), or 0."""


@dataclass(frozen=True, slots=True)
class Note:
    """What a reader decided about a source, in one sentence that a user can check."""

    text: str
    """For example: "classes are the folders: 1000"; a doubtful one ends in the setting that would
    change it."""
    is_doubtful: bool = False
    """Whether the source could be meant otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadRule:
    """How images, labels and splits are found in a source; fields as in `ShardJob`."""

    image_column: str = "image"
    """Image column of Parquet files."""
    label_column: str | None = "label"
    """Label column of Parquet files and of metadata files; None: images have no labels."""
    image_key: str | None = None
    """Extension of a webdataset sample that is its image (`jpg`, `rgb.png`; case does not matter);
    None: the only one that is an image."""
    label_key: str | None = None
    """Extension (`cls`) of a webdataset sample that is its label, or the field of its JSON that is
    (`label`; `meta.label` leads into inner objects); None: the known ones."""
    classes_from: Literal["auto", "folders", "archives", "none"] = "auto"
    """What names the class where no label is stated."""


@dataclass(frozen=True, slots=True)
class Listing:
    """All candidates of a source, sorted by key, with what could not even be listed.

    Grows by about 100 bytes an image, with names of 30 characters.
    """

    table: pa.Table
    """One row per candidate, columns `LISTING_SCHEMA`."""
    rejects: list[tuple[str, str]]
    """(key, reason)."""
    class_names: tuple[str, ...] = ()
    """Known class names in label order when the source states them; else empty."""
    notes: tuple[Note, ...] = ()
    """What was decided, in the order of the decisions."""
    has_stated_labels: bool = False
    """Whether labels stand beside the images (columns, label members, metadata), so that folders
    are no classes."""

    def __len__(self) -> int:
        return self.table.num_rows


@dataclass(frozen=True, slots=True)
class Record:
    """One candidate with its content: encoded bytes, RGB pixels [height, width, 3], or an error."""

    candidate: Candidate
    data: bytes | np.ndarray | None
    error: str = ""


def listed(
    kind: str,
    container: str,
    *,
    keys: Sequence[str],
    class_names: Sequence[str],
    split: str = "",
    index: Sequence[int] | np.ndarray | int = 0,
    size_bytes: Sequence[int] | int = 0,
    member: Sequence[str] | str = "",
    unit: Sequence[int] | np.ndarray | int = 0,
) -> pa.Table:
    """Table of the candidates of one container; a single value stands for all of them."""
    members = [member] if isinstance(member, str) else member
    names = pa.array([file_name_bytes(name) for name in members], pa.binary())
    count = len(keys)
    if isinstance(member, str):
        names = names.take(pa.array(np.zeros(count, np.int64)))
    columns = [
        pa.array(keys, pa.string()),
        pa.array(class_names, pa.string()).dictionary_encode(),
        _repeated(split, count),
        _repeated(kind, count),
        _repeated(file_name_bytes(container), count),
        _numbers(index, count, pa.int64()),
        _numbers(size_bytes, count, pa.int64()),
        names,
        _numbers(unit, count, pa.int32()),
    ]
    return pa.table(columns, schema=LISTING_SCHEMA)


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """Listings as one, in their order, with one dictionary a column."""
    if not tables:
        return LISTING_SCHEMA.empty_table()
    return pa.concat_tables(tables).unify_dictionaries().combine_chunks()


def _repeated(value: str | bytes, count: int) -> pa.DictionaryArray:
    codes = pa.array(np.zeros(count, np.int32))
    return pa.DictionaryArray.from_arrays(codes, pa.array([value]))


def _numbers(values: Sequence[int] | np.ndarray | int, count: int, kind: pa.DataType) -> pa.Array:
    return pa.array(np.full(count, values) if isinstance(values, int) else values, kind)


def dictionary_of(table: pa.Table, name: str) -> tuple[np.ndarray, list[str]]:
    """A column whose values repeat, as codes of every row and the value of each code."""
    column: Any = table.column(name).combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # an empty table has no chunk
        return np.empty(0, np.int32), []
    return column.indices.to_numpy(), column.dictionary.to_pylist()


def with_values(table: pa.Table, name: str, codes: np.ndarray, values: Sequence[str]) -> pa.Table:
    """The table with another column of values that repeat; inverse of `dictionary_of`."""
    unique = {value: code for code, value in enumerate(dict.fromkeys(values))}
    of_code = np.array([unique[value] for value in values], np.int32)
    column = pa.DictionaryArray.from_arrays(
        of_code[codes].astype(np.int32), pa.array(list(unique), pa.string())
    )
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(place), column)


def to_candidates(table: pa.Table) -> list[Candidate]:
    """Rows of a listing, or of a part of one, as candidates: about 500 bytes each."""
    columns = {name: table.column(name).to_pylist() for name in LISTING_SCHEMA.names}
    for name in ("container", "member"):
        columns[name] = [file_name(value) for value in columns[name]]
    return [Candidate(*row) for row in zip(*columns.values(), strict=True)]


def file_name_bytes(name: str) -> bytes:
    """A file name or address as the file system has it."""
    return name.encode("utf-8", "surrogateescape")


def file_name(name: bytes) -> str:
    """Inverse of `file_name_bytes`."""
    return name.decode("utf-8", "surrogateescape")


def is_image_name(name: str) -> bool:
    """Whether a file name looks like an image; hidden files (`.x`, `._x.jpg`) do not."""
    base = name.rpartition("/")[2]
    return not base.startswith(".") and splitext(base)[1].lower() in IMAGE_SUFFIXES


def is_hidden_name(part: str) -> bool:
    """Whether a file or folder is hidden, or is what a system adds to the folders of its users."""
    return part.startswith(".") or part in SYSTEM_FOLDERS


def printable(name: str) -> str:
    """A file name as valid Unicode: bytes that are none are shown as escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def group_by_container(candidates: Sequence[Candidate]) -> Iterator[tuple[str, list[Candidate]]]:
    """Runs of neighbouring candidates of one container, in order."""
    start = 0
    for stop in range(1, len(candidates) + 1):
        if stop == len(candidates) or candidates[stop].container != candidates[start].container:
            yield candidates[start].container, list(candidates[start:stop])
            start = stop


def is_number(name: str) -> bool:
    """Whether the name of a class is a number; Python refuses to read the longest ones."""
    return name.isdecimal() and len(name) <= MAX_DIGITS


def sort_class_names(names: Iterable[str]) -> list[str]:
    """Class names in label order: by value when all are numbers, else by code point."""
    unique = set(names)
    if all(is_number(name) for name in unique):
        return sorted(unique, key=lambda name: (int(name), name))
    return sorted(unique)
