"""Label files that a setting names (`shard.label_file`, `shard.val_label_file`).

Lines `NAME LABEL` as Caffe's `val.txt`, lines of fields between tabs, or CSV whose first column is
the image and second the label, as Kaggle's `LOC_val_solution.csv`. A label is the name of a class,
or the position of a class among the sorted names, from 0. An image is found by its path or by its
name alone, with or without its suffix.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from os.path import expanduser
from posixpath import splitext

import numpy as np
import pyarrow as pa

from drorae.data.readers.candidates import (
    Listing,
    Note,
    dictionary_of,
    is_number,
    with_values,
)
from drorae.data.readers.class_paths import described
from drorae.data.readers.completing import without_rows
from drorae.data.readers.filesystem import read_content
from drorae.data.readers.labels import BadLabel, cell_label, decoded, path_key

__all__ = ["labelled_by_file", "read_label_file"]

BOXES = re.compile(r"(\S+)(\s+-?\d+){4,}")
"""A class and boxes of four numbers, as Kaggle's ImageNet writes them."""

BARE_NUMBERS = (
    " (bare numbers name no images; those of ImageNet's development kit count its classes in "
    "another order than the sorted names)"
)
NOT_MENTIONED = "has no label in the label file"
AMBIGUOUS = "its name in the label file fits several images"


def read_label_file(uri: str, setting: str) -> dict[str, str]:
    """Label of each name of a label file; grows by about 200 bytes a line.

    Args:
        uri: Local path or s3:// address.
        setting: Its setting, for errors.

    Raises:
        FileNotFoundError: It does not exist.
        ValueError: It is no label file: which line, and what was expected.
        RuntimeError: The object store refused or did not answer.
    """
    try:
        text = decoded(read_content(expanduser(uri)), "strict")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{setting}={uri!r} does not exist: correct it.") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{setting}={uri!r} is no UTF-8 text: expected lines NAME LABEL. Correct it."
        ) from error
    labels: dict[str, str] = {}
    for number, name, label in _rows(text, uri, setting):
        key = path_key(name)
        if labels.setdefault(key, label) != label:
            raise ValueError(
                f"{setting}={uri!r}, line {number}: {name!r} is {label!r} here and {labels[key]!r} "
                "before: expected one label an image. Correct the file."
            )
    return labels


def _rows(text: str, uri: str, setting: str) -> Iterator[tuple[int, str, str]]:
    is_csv = uri.lower().endswith(".csv")
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""))) if is_csv else _lines(text)
    except csv.Error as error:
        raise ValueError(f"{setting}={uri!r} is no CSV ({error}): correct the file.") from error
    for number, row in enumerate(rows, 1):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) < 2 or not row[0].strip():
            hint = BARE_NUMBERS if row[0].strip().isdecimal() else ""
            raise ValueError(
                f"{setting}={uri!r}, line {number}: {row[0][:40]!r} is no name and label{hint}: "
                "expected lines NAME LABEL, or CSV with a header. Name another file."
            )
        yield number, row[0].strip(), _label(row[1])


def _lines(text: str) -> list[list[str]]:
    rows = []
    for line in text.splitlines():
        line = line.strip(" \r")
        rows.append(line.split("\t") if "\t" in line else line.rsplit(None, 1) or [""])
    return rows


def _label(text: str) -> str:
    with_boxes = BOXES.fullmatch(text.strip())
    try:
        return cell_label(with_boxes[1] if with_boxes else text)
    except BadLabel:  # text is always a name
        return ""


def labelled_by_file(
    listing: Listing,
    labels: Mapping[str, str],
    setting: str,
    known: Sequence[str],
    splits: Collection[str] = ("", "train", "val"),
) -> Listing:
    """A listing whose classes are those of a label file.

    Args:
        listing: The images.
        labels: Content of the file.
        setting: Its setting, for errors.
        known: Class names of training in label order; empty where the file itself names them.
        splits: Splits of the images that the file speaks of.

    Raises:
        ValueError: A label is no class of training, or no image is in the file.
    """
    split_codes, found_splits = dictionary_of(listing.table, "split")
    is_meant = np.array([split in splits for split in found_splits], bool)[split_codes]
    meant = np.flatnonzero(is_meant)
    keys = listing.table["key"].take(pa.array(meant)).to_pylist()
    entries = [_entry(path_key(key), labels) for key in keys]
    uses = Counter(entries)
    if meant.size and uses[""] == meant.size:
        raise ValueError(
            f"{setting} names none of {meant.size} images, such as {keys[0]!r}; it begins with "
            f"{', '.join(list(labels)[:2])}: expected their names. Correct {setting}."
        )
    class_of = _classes({entry: labels[entry] for entry in uses if entry}, setting, known)
    found = [class_of[entry] if entry and uses[entry] == 1 else "" for entry in entries]
    listing = _with_classes(listing, meant, found)
    is_ambiguous = np.zeros(len(listing), bool)
    is_ambiguous[meant] = [bool(entry) and uses[entry] > 1 for entry in entries]
    is_missing = np.zeros(len(listing), bool)
    is_missing[meant] = [not name for name in found]
    listing = replace(listing, notes=(*listing.notes, _note(setting, found, len(labels), uses)))
    is_missing = (is_missing & ~is_ambiguous)[~is_ambiguous]
    listing = without_rows(listing, is_ambiguous, AMBIGUOUS)
    return without_rows(listing, is_missing, NOT_MENTIONED)


def _entry(key: str, labels: Mapping[str, str]) -> str:
    """The name under which a label file knows an image; the longest that fits, or empty."""
    stem = splitext(key)[0]
    while True:
        if key in labels:
            return key
        if stem in labels:
            return stem
        _, sign, key = key.partition("/")
        if not sign:
            return ""
        stem = stem.partition("/")[2]


def _with_classes(listing: Listing, rows: np.ndarray, names: Sequence[str]) -> Listing:
    """The listing with the classes of some rows replaced."""
    codes, values = dictionary_of(listing.table, "class_name")
    number = {name: len(values) + code for code, name in enumerate(dict.fromkeys(names))}
    codes = codes.copy()
    codes[rows] = [number[name] for name in names]
    table = with_values(listing.table, "class_name", codes, [*values, *number])
    return replace(listing, table=table)


def _note(setting: str, found: Sequence[str], num_labels: int, uses: Counter[str]) -> Note:
    left_out = found.count("")
    text = f"labels are those of {setting}: {len(found) - left_out} images"
    if left_out:
        text += f"; {left_out} images that it does not name, or not clearly, are left out"
    unused = num_labels - len(set(uses) - {""})
    if unused > 1:  # one may be the heading
        text += f"; {unused} of its lines name no image"
    return Note(text, is_doubtful=left_out > 0 or unused > 1)


def _classes(labels: Mapping[str, str], setting: str, known: Sequence[str]) -> dict[str, str]:
    """Class name of each entry that an image has."""
    if not known:
        return dict(labels)
    names = set(known)
    are_numbers = all(is_number(name) for name in names)
    found = {name: _class(label, names, known, are_numbers) for name, label in labels.items()}
    unknown = sorted({labels[name] for name, label in found.items() if labels[name] and not label})
    if unknown:
        raise ValueError(
            f"{setting} has labels that training does not know: {described(unknown)}; training has "
            f"{described(known)}. Expected these names, or their positions from 0 to "
            f"{len(known) - 1}. Correct {setting}."
        )
    return found


def _class(label: str, names: set[str], known: Sequence[str], are_numbers: bool) -> str:
    """Class of a label: its name, its first word, or the class at its position."""
    word = label.split(" ", 1)[0]
    if label in names or word in names:
        return label if label in names else word
    is_position = is_number(label) and not are_numbers and int(label) < len(known)
    return known[int(label)] if is_position else ""
