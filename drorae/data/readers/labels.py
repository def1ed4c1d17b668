"""How labels come from each kind of source.

A label is text, the name of a class. Whatever a source states (a number, a name, a member `.cls`, a
field of JSON, a cell of a table) goes through `label_text`, so that the same label written in two
ways is the same class, and what is no label is never one.

Here too are the label files that lie among the images of a folder or a zip: StyleGAN's and EDM's
`dataset.json`, and `metadata.jsonl`, `.csv` or `.parquet` of Hugging Face image folders. What paths
say is in `class_paths`, label files outside of a source are in `label_files`.
"""

import codecs
import csv
import io
import json
import math
import numbers
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from drorae.data.readers.candidates import Note, ReadRule, is_image_name, printable

__all__ = [
    "BadLabel",
    "Stated",
    "cell_label",
    "decoded",
    "is_label_file",
    "label_text",
    "path_key",
    "stated_by_files",
]

STYLEGAN_FILE = "dataset.json"
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
NAME_COLUMN = "file_name"
"""Column of a metadata file that names the image, relative to the metadata file (datasets 4,
ImageFolder)."""

WHOLE_NUMBER = re.compile(r"(-?\d{1,100})(\.0*)?")
"""A whole number as tables are written: 6, 6.0, -1."""

Entry = tuple[str, Any]
"""Name of an image as a file states it, and its label as stated."""


class BadLabel(ValueError):
    """A stated label that names no class; the text is the reason."""


@dataclass(frozen=True, slots=True)
class Stated:
    """What the label files of one source say. Grows by about 200 bytes an image while listing."""

    label_of: Mapping[str, str]
    """Class name by the path of the image in the source, as `path_key` writes it; "": no label."""
    rejects: Mapping[str, str]
    """Images whose stated label is none, by path, and why."""
    notes: tuple[Note, ...]
    """What was decided."""
    decides: bool
    """Whether the files speak of labels at all (to say that there are none counts), so that folders
    are no classes."""

    def absent(self, images: Iterable[str]) -> tuple[Note, ...]:
        """A note of how many labels are stated of images that do not exist, if any are."""
        missing = {*self.label_of, *self.rejects} - {path_key(name) for name in images}
        if not missing:
            return ()
        text = f"{len(missing)} labels are of images that are not there, such as {min(missing)!r}"
        return (Note(printable(text), is_doubtful=True),)


def label_text(value: Any) -> str:
    """Class name of a stated label; empty where none is stated (None, empty text, NaN, -1).

    Whole numbers lose their decimals (2.0 is class "2"); names are stripped of spaces and a byte
    order mark and brought to Unicode's form NFC, in which macOS and Linux agree.

    Raises:
        BadLabel: It is no single class: a list, a mapping, a truth value, a fraction.
    """
    if value is None:
        return ""
    if isinstance(value, bytes):
        value = decoded(value)
    if isinstance(value, str):
        return unicodedata.normalize("NFC", printable(value.strip("\ufeff \t\r\n\0")))
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise BadLabel(f"label {printable(str(value)[:40])!r} is no name and no number")
    if isinstance(value, int):  # which may be too large for a float
        return "" if value < 0 else str(value)
    if math.isnan(value):
        return ""
    if math.isinf(value) or value != math.floor(value):
        raise BadLabel(f"label {value} is no whole number")
    return "" if value < 0 else str(math.floor(value))


def decoded(data: bytes, errors: str = "backslashreplace") -> str:
    """Text of a label or of a label file: UTF-8, or UTF-16 where a byte order mark says so.

    PowerShell for Windows writes UTF-16.
    """
    is_utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if is_utf_16 else "utf-8-sig", errors)


def cell_label(text: str) -> str:
    """Class name of a label that is text in a table: `6.0` is class "6", `-1` is none."""
    number = WHOLE_NUMBER.fullmatch(text.strip())
    if number and (number[2] or number[1].startswith("-")):
        return label_text(int(number[1]))
    return label_text(text)


def path_key(name: str) -> str:
    """A path as names in label files are compared: `/` between folders, no `./`, Unicode's NFC."""
    return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))


def is_label_file(name: str) -> bool:
    """Whether a file of this name states labels of the images beside it (`stated_by_files`)."""
    return name.rpartition("/")[2] in (STYLEGAN_FILE, *METADATA_FILES)


def stated_by_files(files: Mapping[str, bytes], rule: ReadRule) -> Stated:
    """Labels that files among the images state.

    Args:
        files: Content of the label files (`is_label_file`) by their path in the source.
        rule: Its `label_column` is read; where that is None, no file is.

    Raises:
        ValueError: A file is damaged: which, and what to do.
    """
    labels: dict[str, str] = {}
    rejects: dict[str, str] = {}
    notes: list[Note] = []
    decides = False
    for path in sorted(files) if rule.label_column is not None else ():
        entries = _entries(path, files[path], rule, notes)
        if entries is None:
            continue
        decides = True
        for name, value in entries:
            _add(path_key(posixpath.join(posixpath.dirname(path), name)), value, labels, rejects)
    return Stated(labels, rejects, tuple(notes), decides)


def _add(key: str, value: Any, labels: dict[str, str], rejects: dict[str, str]) -> None:
    try:
        label = cell_label(value) if isinstance(value, str) else label_text(value)
    except BadLabel as reason:
        rejects[key] = str(reason)
        labels.pop(key, None)
        return
    if key in rejects:
        return
    if labels.setdefault(key, label) != label:
        rejects[key] = f"has two labels: {labels.pop(key)!r} and {label!r}"


def _entries(path: str, data: bytes, rule: ReadRule, notes: list[Note]) -> list[Entry] | None:
    """What one file states; None where it says nothing of labels."""
    try:
        if posixpath.basename(path) == STYLEGAN_FILE:
            return _stylegan_entries(path, json.loads(_text(data)), notes)
        return _metadata_entries(path, data, rule, notes)
    except Exception as error:  # parsers raise almost any type on damaged input
        raise ValueError(
            f"label file {printable(path)!r} in the source cannot be read ({error}): expected what "
            f"{_expected(path)} writes. Correct it, or remove it or set shard.label_column=null to "
            "read the images without it."
        ) from error


def _expected(path: str) -> str:
    is_stylegan = posixpath.basename(path) == STYLEGAN_FILE
    return "StyleGAN's dataset_tool" if is_stylegan else "a Hugging Face image folder"


def _text(data: bytes) -> str:
    return decoded(data, "strict")


def _stylegan_entries(path: str, content: Any, notes: list[Note]) -> list[Entry] | None:
    labels = content.get("labels", ()) if isinstance(content, dict) else ()
    if labels is None:
        text = f"{path} says that there are no labels, so folders are no classes"
        notes.append(Note(printable(text)))
        return []
    if isinstance(labels, dict) and all(map(is_image_name, labels)):  # its loader takes both
        labels = list(labels.items())
    if not isinstance(labels, list) or not labels:
        text = f"{path} has no list `labels`, so it states none; StyleGAN's own file has one"
        notes.append(Note(printable(text), is_doubtful=True))
        return None
    entries = [(str(name), label) for name, label in labels]
    notes.append(Note(printable(f"labels are those of {path}: {len(entries)}")))
    return entries


def _metadata_entries(
    path: str, data: bytes, rule: ReadRule, notes: list[Note]
) -> list[Entry] | None:
    label_column = rule.label_column or ""
    columns, rows = TABLES[posixpath.splitext(path)[1]](data)
    absent = next((name for name in (NAME_COLUMN, label_column) if name not in columns), None)
    if absent:
        text = (
            f"{path} has no column {absent!r} (it has {', '.join(columns)}), so it states no label;"
            " shard.label_column names the column of labels"
        )
        notes.append(Note(printable(text), is_doubtful=True))
        return None
    entries = [
        (str(row[NAME_COLUMN]), row.get(label_column)) for row in rows if row.get(NAME_COLUMN)
    ]
    text = f"labels are column {label_column!r} of {path}: {len(entries)}"
    notes.append(Note(printable(text)))
    return entries


Table = tuple[list[str], Iterable[Mapping[str, Any]]]
"""Columns and rows of a metadata file."""


def _json_lines(data: bytes) -> Table:
    rows = [json.loads(line) for line in _text(data).split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is no JSON object")
    return list(dict.fromkeys(name for row in rows for name in row)), rows


def _comma_separated(data: bytes) -> Table:
    reader = csv.DictReader(io.StringIO(_text(data), newline=""))
    return list(reader.fieldnames or ()), reader


def _parquet(data: bytes) -> Table:
    table = pq.read_table(pa.BufferReader(data))

    def rows() -> Iterator[Mapping[str, Any]]:
        for batch in table.to_batches():
            yield from batch.to_pylist()

    return table.column_names, rows()


TABLES: Mapping[str, Callable[[bytes], Table]] = {
    ".jsonl": _json_lines,
    ".csv": _comma_separated,
    ".parquet": _parquet,
}
