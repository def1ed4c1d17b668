"""What paths say of images: their split, their class, and which of them lie outside of both.

One rule for folder trees and for the members of archives: folders around everything are left out
(`ILSVRC/Data/CLS-LOC`), then come the splits, if the folders are called so, then the classes, the
first folder below. Decisions follow what most images do, so that one stray picture changes none.
Cost grows with the folders, not with the images.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from drorae.data.readers.candidates import Note, printable, sort_class_names
from drorae.data.readers.labels import label_text
from drorae.data.readers.split_words import split_of_word, splits_of_folders

__all__ = ["Place", "Reading", "described", "read_folders"]

NAMES_BESIDE_IMAGES = """
images image imgs img jpegimages masks mask segmentations segmentation segmentationclass labels
annotations annotation depth thumbnails thumbs previews
"""
BESIDE_IMAGES = frozenset(NAMES_BESIDE_IMAGES.split())
"""Folders of what belongs to images, and of images that lie beside it; rarely classes."""

OUTSIDE = "lies outside of every class folder"
IN_FOLDER = "lies in a folder, although most images do not"
NO_SPLIT = "lies in no split"
OF_TEST = "belongs to split test"
UNKNOWN_KIND = "not an image by its name, in a folder without images"

MAX_NAMES = 5
STRAY_SHARE = 3
"""Up to one image of so many beside the folders of the others is a stray one."""

Parts = tuple[str, ...]
Counts = Mapping[Parts, int]


@dataclass(frozen=True, slots=True)
class Place:
    """What the folder of an image says of it."""

    split: str = ""
    """`train`, `val`, or empty: it says none."""
    class_name: str = ""
    """Class; empty: it says none."""
    reason: str = ""
    """Why the image cannot be used; empty: it can."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What the folders of a source say."""

    places: Mapping[str, Place]
    """Of every folder."""
    notes: tuple[Note, ...]
    """What was decided."""


def described(names: Sequence[str]) -> str:
    """Number and first names: `3 (cat, dog, owl)`."""
    more = ", ..." if len(names) > MAX_NAMES else ""
    return f"{len(names)} ({', '.join(names[:MAX_NAMES])}{more})"


def read_folders(counts: Mapping[str, int], *, has_classes: bool = True) -> Reading:
    """Decide what the folders of a source mean.

    Args:
        counts: Images by their folder, "" for those in none. A folder of 0 has files that may be
            images; it decides nothing.
        has_classes: Whether folders name classes; else only splits are read.
    """
    notes: list[Note] = []
    parts = {folder: _parts(folder) for folder in counts}
    by_parts: Counter[Parts] = Counter()
    for folder, count in counts.items():
        by_parts[parts[folder]] += count
    if not by_parts.total():
        by_parts = Counter(dict.fromkeys(by_parts, 1))
    places = _read(by_parts, notes, has_classes)
    _note_merged(by_parts, places, notes)
    return Reading({folder: places[parts[folder]] for folder in counts}, tuple(notes))


def _parts(folder: str) -> Parts:
    return tuple(part for part in folder.split("/") if part not in ("", "."))


def _read(counts: Counts, notes: list[Note], has_classes: bool) -> dict[Parts, Place]:
    wrapper = _wrapper(counts)
    inside = _below(counts, wrapper)
    split_of = _splits(inside, notes)
    places = {parts: Place(reason=OUTSIDE) for parts in counts}
    if not split_of:
        classes = _classes(inside, has_classes)
        if wrapper and has_classes and len({p.class_name for p in classes.values()} - {""}) > 1:
            text = f"folder {'/'.join(wrapper)!r} is around all images: the folders in it are"
            text += " classes; shard.classes_from=none takes them as one"
            notes.append(Note(printable(text), is_doubtful=True))
        _note_depth(inside, classes, notes)
    else:
        classes = _split_classes(inside, split_of, notes, has_classes)
    places |= {wrapper + parts: place for parts, place in classes.items()}
    names = sort_class_names({p.class_name for p in places.values()} - {""})
    if names:
        notes.append(Note(f"classes are folders: {described(names)}"))
    beside = [name for name in names if name.lower() in BESIDE_IMAGES]
    if beside and len(names) > 1:
        text = f"folders {', '.join(beside)} are read as classes, but by their names they hold "
        text += "images and what belongs to them: set shard.source to the folder that is meant"
        notes.append(Note(text, is_doubtful=True))
    return places


def _below(counts: Counts, prefix: Parts) -> dict[Parts, int]:
    size = len(prefix)
    return {parts[size:]: n for parts, n in counts.items() if parts[:size] == prefix}


def _tops(counts: Counts) -> Counter[str]:
    """Images by their first folder; folders without any are left out."""
    tops: Counter[str] = Counter()
    for parts, count in counts.items():
        if parts and count:
            tops[parts[0]] += count
    return tops


def _wrapper(counts: Counts) -> Parts:
    """Folders around all images, the outermost first; strays are overlooked."""
    wrapper: Parts = ()
    inside = dict(counts)
    while True:
        tops, direct = _tops(inside), inside.get((), 0)
        if len(tops) != 1 or not _is_few(direct, direct + tops.total()):
            return wrapper
        (top,) = tops
        deeper = _below(inside, (top,))
        in_top = deeper.get((), 0)
        is_class = not _is_few(in_top, sum(deeper.values())) and not split_of_word(top)
        if is_class:
            return wrapper
        wrapper, inside = (*wrapper, top), deeper


def _is_few(count: int, of: int) -> bool:
    return count * STRAY_SHARE <= of


def _splits(counts: Counts, notes: list[Note]) -> dict[str, str]:
    """Split of each top folder that is one; empty: the tops are no splits."""
    tops = _tops(counts)
    split_of = splits_of_folders(tops)
    if not split_of:
        return {}
    others = tops.total() - sum(tops[top] for top in split_of)
    is_exact = all(map(split_of_word, split_of))
    if not is_exact and not _is_few(others, tops.total()):
        return {}
    if others * 2 > tops.total():
        text = f"folders {', '.join(split_of)} are read as classes, because most images lie in none"
        notes.append(Note(printable(text + " of them"), is_doubtful=True))
        return {}
    if others:
        text = f"{others} images lie beside the splits {', '.join(split_of)} and are left out"
        notes.append(Note(printable(text), is_doubtful=True))
    if "val" not in split_of.values():
        split_of = {top: "val" if kind == "test" else kind for top, kind in split_of.items()}
    told = ", ".join(
        f"{top} is {split_of[top] if split_of[top] != 'test' else 'left out'} ({tops[top]} images)"
        for top in split_of
    )
    notes.append(Note(printable(f"splits are folders: {told}"), is_doubtful=not is_exact))
    return split_of


def _split_classes(
    counts: Counts, split_of: Mapping[str, str], notes: list[Note], has_classes: bool
) -> dict[Parts, Place]:
    places = {parts: Place(reason=OUTSIDE if not parts else NO_SPLIT) for parts in counts}
    known: set[str] = set()
    for top, split in sorted(split_of.items(), key=lambda item: item[1]):
        below = _below(counts, (top,))
        if split == "test":
            found = dict.fromkeys(below, Place(reason=OF_TEST))
        else:
            found = _classes_inside(below, has_classes, known if split == "val" else None, notes)
            known |= {place.class_name for place in found.values() if split == "train"} - {""}
            _note_depth(below, found, notes)
        for parts, place in found.items():
            places[(top, *parts)] = Place(split, place.class_name, place.reason)
    if not known and any(place.class_name for place in places.values()):
        text = "training images lie in no class folders, so those of validation are no classes"
        notes.append(Note(text, is_doubtful=True))
        places = {p: Place(place.split, "", place.reason) for p, place in places.items()}
    return places


def _classes_inside(
    counts: Counts, has_classes: bool, known: set[str] | None, notes: list[Note]
) -> dict[Parts, Place]:
    """Classes of one split, which may have folders around them of its own."""
    wrapper = _wrapper(counts)
    tops = _tops(_below(counts, wrapper))
    if known is not None and len(tops) == 1 and not known & {_class_name(top) for top in tops}:
        wrapper = (*wrapper, *tops)
        text = f"folder {'/'.join(wrapper)!r} of validation is no class of training: its images are"
        notes.append(Note(printable(f"{text} read as lying flat"), is_doubtful=has_classes))
    found = _classes(_below(counts, wrapper), has_classes)
    outside = {parts: Place(reason=OUTSIDE) for parts in counts}
    return outside | {wrapper + parts: place for parts, place in found.items()}


def _classes(counts: Counts, has_classes: bool) -> dict[Parts, Place]:
    tops = _tops(counts)
    direct = counts.get((), 0)
    if not has_classes or not tops:
        return {parts: Place() for parts in counts}
    if direct > tops.total():
        return {parts: Place(reason=IN_FOLDER if parts else "") for parts in counts}
    return {parts: _place(parts, tops) for parts in counts}


def _place(parts: Parts, tops: Counter[str]) -> Place:
    if not parts:
        return Place(reason=OUTSIDE)
    if parts[0] not in tops:
        return Place(reason=UNKNOWN_KIND)
    return Place(class_name=_class_name(parts[0]))


def _class_name(folder: str) -> str:
    return label_text(folder) or printable(folder)


def _note_depth(counts: Counts, places: Mapping[Parts, Place], notes: list[Note]) -> None:
    """Tell a class of most images that lie in several folders: they could be classes."""
    for top, count in _tops(counts).most_common(1):
        deeper = _tops(_below(counts, (top,)))
        is_class = any(
            p and p[0] == top and place.class_name == _class_name(top)
            for p, place in places.items()
        )
        if is_class and count * 2 > sum(counts.values()) and len(deeper) > 1:
            text = f"class {top!r} has most images, in {len(deeper)} folders of its own, which are"
            text += " no classes; to make them classes, set shard.source to that folder"
            notes.append(Note(printable(text), is_doubtful=True))


def _note_merged(counts: Counts, places: Mapping[Parts, Place], notes: list[Note]) -> None:
    """Tell folders that are one class although their names differ: spaces, forms of Unicode."""
    spellings: dict[str, set[str]] = defaultdict(set)
    for parts in counts:
        name = places[parts].class_name
        spellings[name] |= {part for part in parts if name and _class_name(part) == name}
    merged = sorted(name for name, found in spellings.items() if len(found) > 1)
    if merged:
        text = (
            "folders whose names differ only in spaces or in their form of Unicode are one class: "
        )
        notes.append(Note(text + described(merged)))
