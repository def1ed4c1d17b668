"""The last decisions on a listing: order, splits, who lacks a label, names of classes.

Labels count the classes of the training images alone, so that validation moves none.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from drorae.data.readers.candidates import (
    UNLABELLED,
    Listing,
    Note,
    dictionary_of,
    sort_class_names,
    with_values,
)
from drorae.data.readers.class_paths import described

__all__ = ["check_val_classes", "complete", "split_values", "training_classes", "without_rows"]

TABLE_SUFFIXES = (".csv", ".tsv", ".txt")
"""Files that may be what `shard.label_file` expects."""

MISSING_WORDS = frozenset({"none", "null", "nan", "n/a", "<na>", "undefined"})
"""What programs write as text where there is no value."""

NO_LABEL = "has no label although others have"
SAME_KEY = "another image has this name"
ASK_FOR_VAL_LABELS = "shard.val_label_file names a file of them"


def complete(listing: Listing) -> Listing:
    """A listing sorted by key, in which every training image has a class.

    A class name is empty only for validation images that lie flat beside training images in class
    folders. A split `train` without `val` says nothing, so it is dropped. Whether training knows
    the classes of validation is left to `check_val_classes`.
    """
    listing = replace(listing, table=listing.table.sort_by("key").combine_chunks())
    listing = without_rows(listing, _repeats(listing.table), SAME_KEY)
    listing = _label_all(listing)
    splits = set(split_values(listing.table))
    if "val" not in splits and len(listing):
        codes = np.zeros(len(listing), np.int32)
        listing = replace(listing, table=with_values(listing.table, "split", codes, [""]))
    names = listing.class_names or training_classes(listing.table)
    return replace(listing, class_names=names, notes=(*listing.notes, *_odd_names(listing, names)))


def split_values(table: pa.Table) -> list[str]:
    """Splits that rows of a listing are in."""
    return table["split"].unique().to_pylist()


def without_rows(listing: Listing, is_bad: np.ndarray, reason: str) -> Listing:
    """The listing with some rows as rejects."""
    if not is_bad.any():
        return listing
    keys = listing.table["key"].filter(pa.array(is_bad)).to_pylist()
    table = listing.table.filter(pa.array(~is_bad)).combine_chunks()
    return replace(
        listing, table=table, rejects=[*listing.rejects, *((key, reason) for key in keys)]
    )


def check_val_classes(names: Sequence[str], table: pa.Table) -> None:
    """Check that the validation images of a table have classes that training knows.

    Raises:
        ValueError: Which are unknown, and what to do.
    """
    found = _classes_of(table, "val") - {""}
    unknown = sort_class_names(found - set(names))
    if unknown:
        raise ValueError(
            f"validation images have classes that no training image has: {described(unknown)}; "
            f"training has {described(names)}. Expected the same names, since labels count those "
            "of training. Rename the folders or labels, take these images out, or give the labels "
            "of images that lie flat with shard.val_label_file."
        )


def _repeats(table: pa.Table) -> np.ndarray:
    functions: Any = pyarrow.compute
    keys = table["key"].combine_chunks()
    if len(table) < 2:
        return np.zeros(len(table), bool)
    same = functions.equal(keys.slice(1), keys.slice(0, len(table) - 1))
    return np.concatenate([[False], same.to_numpy(zero_copy_only=False)])


def _label_all(listing: Listing) -> Listing:
    codes, names = dictionary_of(listing.table, "class_name")
    has_class = np.array([name != "" for name in names], bool)[codes]
    if not len(listing):
        return listing
    if not has_class.any() and not _has_bad_labels(listing):
        table = with_values(listing.table, "class_name", np.zeros(len(codes), int), [UNLABELLED])
        return replace(listing, table=table, notes=(*listing.notes, _no_labels(listing)))
    is_missing = ~has_class
    split_codes, splits = dictionary_of(listing.table, "split")
    is_val = np.array([split == "val" for split in splits], bool)[split_codes]
    notes = list(listing.notes)
    if not listing.has_stated_labels and is_val.any() and is_missing[is_val].all():
        is_missing &= ~is_val
        text = f"{int(is_val.sum())} validation images have no labels; "
        notes.append(Note(text + ASK_FOR_VAL_LABELS, is_doubtful=True))
    if is_missing.any():
        text = f"{int(is_missing.sum())} images have no label although others have: left out"
        notes.append(Note(text, is_doubtful=True))
    return without_rows(replace(listing, notes=tuple(notes)), is_missing, NO_LABEL)


def _no_labels(listing: Listing) -> Note:
    """That there are no labels, and which files might hold them."""
    tables = [key for key, _ in listing.rejects if key.lower().endswith(TABLE_SUFFIXES)]
    if not tables:
        return Note("images have no labels")
    text = f"images have no labels; if {tables[0]} holds them, set shard.label_file to it"
    return Note(text, is_doubtful=True)


def _has_bad_labels(listing: Listing) -> bool:
    """Whether labels are stated, of which none is good."""
    return listing.has_stated_labels and any(
        reason.startswith("has no label:") for _, reason in listing.rejects
    )


def _classes_of(table: pa.Table, split: str = "") -> set[str]:
    """Classes of the rows of a split; of all that are not validation, if none is given."""
    split_codes, splits = dictionary_of(table, "split")
    is_wanted = np.array([name == "val" for name in splits], bool) == (split == "val")
    codes, names = dictionary_of(table, "class_name")
    if not len(codes):
        return set()
    return {names[code] for code in np.unique(codes[is_wanted[split_codes]]).tolist()}


def training_classes(table: pa.Table) -> tuple[str, ...]:
    """Class names of the images that are not validation, in label order."""
    return tuple(sort_class_names(_classes_of(table) - {""}))


def _odd_names(listing: Listing, names: Sequence[str]) -> list[Note]:
    """Tell what is rarely meant as names of classes."""
    notes = _alike(names)
    empty = [name for name in names if name.lower() in MISSING_WORDS]
    if empty:
        text = f"classes are called {', '.join(map(repr, empty))}, which often means: no label"
        notes.append(Note(text, is_doubtful=True))
    num_numbers = sum(name.isdecimal() for name in names)
    if listing.has_stated_labels and 0 < num_numbers < len(names):
        text = f"{num_numbers} labels are numbers and {len(names) - num_numbers} are names, and "
        notes.append(Note(f"{text}each is a class: {described(names)}", is_doubtful=True))
    return notes


def _alike(names: Iterable[str]) -> list[Note]:
    """Tell names that a person or a case-insensitive file system may hold for one."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[unicodedata.normalize("NFKC", name).casefold()].append(name)
    found = [" and ".join(map(repr, group)) for group in alike.values() if len(group) > 1]
    if not found:
        return []
    text = f"classes that differ only by case or by kind of letter stay apart: {described(found)}"
    return [Note(text, is_doubtful=True)]
