"""All images of one `ShardJob`: its sources, its label files, and what each is used for.

Classes are those of the training images alone: validation changes no label.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from drorae.data.jobs import ShardJob
from drorae.data.readers.candidates import (
    UNLABELLED,
    Listing,
    Note,
    ReadRule,
    dictionary_of,
    joined,
    with_values,
)
from drorae.data.readers.completing import (
    ASK_FOR_VAL_LABELS,
    check_val_classes,
    split_values,
    training_classes,
    without_rows,
)
from drorae.data.readers.filesystem import ListingProgress, ignore_progress
from drorae.data.readers.label_files import labelled_by_file, read_label_file
from drorae.data.readers.source import list_source

__all__ = ["list_images", "read_rule"]

NOT_TRAINING = "belongs to the validation of shard.source, but shard.val_source is given"
NOT_VALIDATION = "belongs to the training of shard.val_source"


def list_images(job: ShardJob, *, on_progress: ListingProgress = ignore_progress) -> Listing:
    """List the images of a job, with splits, classes and what was decided.

    The class of a validation image is empty where it has none (label -1). With a `val_source` keys
    start with `train/` or `val/`. Cost as `list_source`.

    Raises:
        FileNotFoundError: A source or label file does not exist.
        ValueError: A source holds no image, or its labels cannot be understood; among them
            validation classes that training does not know.
    """
    rule = read_rule(job)
    listing = list_source(job.source, rule, on_progress=on_progress)
    listing = _with_own_labels(listing, job)
    if job.val_source is None:
        listing = _with_val_labels(listing, job, listing.class_names)
    else:
        val = list_source(job.val_source, rule, on_progress=on_progress)
        listing = _joined(listing, _with_val_labels(val, job, listing.class_names))
    check_val_classes(listing.class_names, listing.table)
    return listing


def read_rule(job: ShardJob) -> ReadRule:
    """How a job wants its sources to be read."""
    return ReadRule(
        image_column=job.image_column,
        label_column=job.label_column,
        image_key=job.image_key,
        label_key=job.label_key,
        classes_from=job.classes_from,
    )


def _with_own_labels(listing: Listing, job: ShardJob) -> Listing:
    if job.label_file is None:
        return listing
    labels = read_label_file(job.label_file, "shard.label_file")
    splits = (
        ("", "train") if job.val_label_file and job.val_source is None else ("", "train", "val")
    )
    known = listing.class_names if listing.class_names != (UNLABELLED,) else ()
    try:
        listing = labelled_by_file(listing, labels, "shard.label_file", known, splits)
    except ValueError:
        if not known:
            raise
        # Folders that are no classes: the file names the classes itself.
        listing = labelled_by_file(listing, labels, "shard.label_file", (), splits)
        text = f"shard.label_file has labels that are none of the {len(known)} classes found "
        text += "without it, so it names the classes itself; correct it if it should not"
        listing = replace(listing, notes=(*listing.notes, Note(text, is_doubtful=True)))
        known = ()
    return replace(listing, class_names=known or training_classes(listing.table))


def _with_val_labels(val: Listing, job: ShardJob, known: Sequence[str]) -> Listing:
    """Validation images with the labels of their label file, or without any where none is."""
    if job.val_label_file is not None:
        labels = read_label_file(job.val_label_file, "shard.val_label_file")
        is_apart = job.val_source is not None and "val" not in split_values(val.table)
        splits = ("", "train", "val") if is_apart else ("val",)
        if not set(splits) & set(split_values(val.table)):
            raise ValueError(
                f"shard.val_label_file={job.val_label_file!r} is given, but shard.source has no "
                "images of its own for validation: expected a folder `val` or shard.val_source."
            )
        # What was said of the images before the file was read holds no longer.
        notes = tuple(note for note in val.notes if not note.text.endswith(ASK_FOR_VAL_LABELS))
        val = replace(val, notes=notes)
        return labelled_by_file(val, labels, "shard.val_label_file", known, splits)
    if job.val_source is None or val.class_names != (UNLABELLED,) or UNLABELLED in known:
        return val
    codes = np.zeros(len(val), np.int64)
    text = f"its {len(val)} images have no labels; {ASK_FOR_VAL_LABELS}"
    notes = (*val.notes, Note(text, is_doubtful=True))
    return replace(val, table=with_values(val.table, "class_name", codes, [""]), notes=notes)


def _joined(train: Listing, val: Listing) -> Listing:
    """The training part of one listing and the validation part of another, as one listing."""
    train = _part(train, "val", NOT_TRAINING)
    if "val" in split_values(val.table):
        val = _part(_part(val, "train", NOT_VALIDATION), "", NOT_VALIDATION)
    return Listing(
        table=joined([_moved(train.table, "train"), _moved(val.table, "val")]),
        rejects=[(f"train/{key}", reason) for key, reason in train.rejects]
        + [(f"val/{key}", reason) for key, reason in val.rejects],
        class_names=train.class_names,
        notes=(*train.notes, *(replace(n, text=f"shard.val_source: {n.text}") for n in val.notes)),
        has_stated_labels=train.has_stated_labels,
    )


def _part(listing: Listing, other: str, reason: str) -> Listing:
    """The listing without the images of one split, which are counted."""
    codes, splits = dictionary_of(listing.table, "split")
    is_other = np.array([split == other for split in splits], bool)[codes]
    if not is_other.any():
        return listing
    note = Note(f"{int(is_other.sum())} images are left out: each {reason}", is_doubtful=True)
    return without_rows(replace(listing, notes=(*listing.notes, note)), is_other, reason)


def _moved(table: pa.Table, split: str) -> pa.Table:
    """The same candidates in a split, their keys below its name."""
    functions: Any = pyarrow.compute
    keys = functions.binary_join_element_wise(pa.scalar(split), table["key"], "/")
    place = table.schema.get_field_index("key")
    table = table.set_column(place, table.schema.field(place), keys)
    return with_values(table, "split", np.zeros(len(table), np.int64), [split])
