"""From the parts of a source to one listing: splits and classes where no label is stated.

A part is a container, or all files of a folder. Every decision is made once for the whole source,
so that shards of one data set are read alike. Nothing here opens a file.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from drorae.data.readers.archives import (
    archive_class,
    archive_note,
    container_splits,
    is_shard_numbering,
)
from drorae.data.readers.candidates import (
    Listing,
    Note,
    ReadRule,
    dictionary_of,
    is_image_name,
    joined,
    printable,
    sort_class_names,
    with_values,
)
from drorae.data.readers.class_lists import with_shared_names
from drorae.data.readers.class_paths import OF_TEST, Place, read_folders

__all__ = ["Part", "assemble"]

MAX_NOTES = 20
"""Notes of parts that are kept; ten thousand shards may each have one of their own."""

FOLDERS: Any = pyarrow.compute


@dataclass(frozen=True, slots=True)
class Part:
    """What one container holds, or the files of a folder."""

    name: str
    """Name of the container inside the source, with which its keys start; empty for files."""
    listing: Listing
    """Its listing; class names are those stated beside the images, or empty."""

    @property
    def is_archive(self) -> bool:
        """Whether its images have paths of their own."""
        return bool(self.name) and not self.name.lower().endswith(".parquet")


def assemble(parts: Sequence[Part], rule: ReadRule) -> Listing:
    """One listing of all parts, with the splits and classes that names and paths give.

    Args:
        parts: The parts.
        rule: Its `classes_from` is read.

    Raises:
        ValueError: `classes_from` asks for archives, and there are none; or some containers have
            numbers and others names.
    """
    if rule.classes_from == "archives" and not any(part.name for part in parts):
        raise ValueError(
            "shard.classes_from='archives', but the source has no archives: expected several .tar, "
            ".zip or .parquet files. Set shard.classes_from='folders' or 'auto'."
        )
    is_stated = any(part.listing.has_stated_labels for part in parts)
    notes = [note for part in parts for note in part.listing.notes]
    names = [part.name for part in parts]
    named, told = with_shared_names(names, [part.listing for part in parts])
    parts = [Part(name, listing) for name, listing in zip(names, named, strict=True)]
    notes += told
    placed = _placed(parts, rule, is_stated, notes)
    return Listing(
        table=joined([listing.table for listing in placed]),
        rejects=[reject for listing in placed for reject in listing.rejects],
        class_names=_stated_names(parts, notes),
        notes=tuple(_few(notes)),
        has_stated_labels=is_stated,
    )


def _placed(
    parts: Sequence[Part], rule: ReadRule, is_stated: bool, notes: list[Note]
) -> list[Listing]:
    split_of, told = container_splits([part.name for part in parts])
    notes += told
    has_classes = not is_stated and rule.classes_from in ("auto", "folders")
    folders = [_folders(part) for part in parts]
    counts: Counter[str] = Counter()
    for found in folders:
        counts.update(found.counts)
    reading = read_folders(counts, has_classes=has_classes)
    notes += reading.notes
    is_flat = not any(place.class_name for place in reading.places.values())
    by_archive = not is_stated and _are_classes(parts, rule, is_flat, notes)
    listings = []
    for part, found in zip(parts, folders, strict=True):
        places = [reading.places.get(folder, Place()) for folder in found.names]
        if by_archive:
            name = archive_class(part.name)
            places = [replace(place, class_name=name) for place in places]
        if split_of:
            places = [_in_split(place, split_of[part.name]) for place in places]
        listings.append(_apply(part.listing, found.codes, places, is_stated))
    return listings


def _are_classes(parts: Sequence[Part], rule: ReadRule, is_flat: bool, notes: list[Note]) -> bool:
    """Whether archives are classes."""
    if rule.classes_from == "archives":
        return True
    names = [part.name for part in parts if part.is_archive]
    if rule.classes_from != "auto" or not is_flat or len(names) < 2 or len(names) < len(parts):
        return False
    are_classes = not is_shard_numbering(names)
    notes.append(archive_note(names, are_classes))
    return are_classes


def _in_split(place: Place, split: str) -> Place:
    if split == "test":
        return Place(reason=place.reason or OF_TEST)
    return replace(place, split=split)


@dataclass(frozen=True, slots=True)
class _Folders:
    """In which folder each image of a part lies."""

    codes: np.ndarray
    """Number of the folder of each image."""
    names: list[str]
    """Folders by number."""
    counts: dict[str, int]
    """Images by folder, as `read_folders` takes them."""


def _folders(part: Part) -> _Folders:
    keys = part.listing.table["key"]
    if part.name and not part.is_archive:
        return _Folders(np.zeros(len(keys), np.int64), [""], {})
    if part.name:
        keys = FOLDERS.utf8_slice_codeunits(keys, len(printable(part.name)) + 1)
    if part.name.lower().endswith(".zip"):
        keys = FOLDERS.replace_substring(keys, "\\", "/")  # as old tools for Windows write
    paths = FOLDERS.replace_substring_regex(keys, "/?[^/]*$", "")
    found = paths.combine_chunks().dictionary_encode()
    if isinstance(found, pa.ChunkedArray):
        return _Folders(np.empty(0, np.int64), [], {})
    names, codes = found.dictionary.to_pylist(), found.indices.to_numpy()
    sure = np.fromiter((is_image_name(key) for key in keys.to_pylist()), bool, len(keys))
    counts = np.bincount(codes[sure], minlength=len(names)).tolist()
    return _Folders(codes, names, dict(zip(names, counts, strict=True)))


def _apply(
    listing: Listing, codes: np.ndarray, places: Sequence[Place], is_stated: bool
) -> Listing:
    """The listing with splits and classes of the folders, without the images that have no place."""
    table = listing.table
    if not len(table):
        return listing
    is_bad = np.array([bool(place.reason) for place in places], bool)[codes]
    if any(place.split for place in places):
        table = with_values(table, "split", codes, [place.split for place in places])
    if not is_stated:
        table = with_values(table, "class_name", codes, [place.class_name for place in places])
    if not is_bad.any():
        return replace(listing, table=table)
    keys = table["key"].take(pa.array(np.flatnonzero(is_bad))).to_pylist()
    reasons = [places[code].reason for code in codes[is_bad].tolist()]
    rejects = [*listing.rejects, *zip(keys, reasons, strict=True)]
    return replace(listing, table=table.filter(pa.array(~is_bad)), rejects=rejects)


def _stated_names(parts: Sequence[Part], notes: list[Note]) -> tuple[str, ...]:
    """Names of classes in label order, as containers list them."""
    lists = list(dict.fromkeys(p.listing.class_names for p in parts if p.listing.class_names))
    names = lists[0] if lists else ()
    if len(lists) > 1:
        names = tuple(sort_class_names({name for names in lists for name in names}))
        text = f"containers list {len(lists)} different sets of class names, so labels count the "
        text += f"{len(names)} names of all in sorted order"
        notes.append(Note(text, is_doubtful=True))
    found = {
        name for part in parts for name in dictionary_of(part.listing.table, "class_name")[1]
    } - {""}
    if names and found - set(names):
        names = tuple(sort_class_names({*names, *found}))
        text = "some labels are none of the class names that the containers list, so labels count "
        notes.append(Note(f"{text}all {len(names)} in sorted order", is_doubtful=True))
    return names


def _few(notes: Iterable[Note]) -> list[Note]:
    """Each note once, and not too many."""
    unique = list(dict.fromkeys(notes))
    if len(unique) <= MAX_NOTES:
        return unique
    unique.sort(key=lambda note: not note.is_doubtful)
    rest = unique[MAX_NOTES:]
    more = Note(f"{len(rest)} more notes of this kind", any(note.is_doubtful for note in rest))
    return [*unique[:MAX_NOTES], more]
