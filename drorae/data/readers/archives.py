"""What the names of containers say: splits and classes.

Splits are words in them (`train-00000-of-00002.parquet`). Classes are the names of archives in
which images lie flat (`n01440764.tar`), unless they are numbered as shards of one set are.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from posixpath import dirname

from drorae.data.readers.candidates import Note, printable
from drorae.data.readers.class_paths import described
from drorae.data.readers.labels import label_text
from drorae.data.readers.split_words import split_of_word

__all__ = ["CONTAINER_SUFFIXES", "archive_class", "container_splits", "is_shard_numbering"]

CONTAINER_SUFFIXES = (".tar.gz", ".tar", ".tgz", ".zip", ".parquet")
"""Names of containers that are listed; a compressed tar is refused with its reason."""

WORDS = re.compile(r"[^\W_]+")
NUMBERED = re.compile(r"(.*?)(\d+)")
SHARD_WORDS = frozenset({"shard", "shards", "part", "parts", "chunk", "chunks", "batch", "of"})


def container_splits(names: Sequence[str]) -> tuple[Mapping[str, str], tuple[Note, ...]]:
    """Split of each container by a word in its name, or in that of a folder around it.

    Args:
        names: Names inside the source.

    Returns:
        `train`, `val` or `test` by name; empty unless each name says one and one says train.
    """
    split_of = {name: _split(name) for name in names}
    kinds = Counter(split_of.values())
    if "train" not in kinds or len(set(kinds) - {""}) < 2:
        return {}, ()
    if kinds[""]:
        text = f"{kinds['']} of {len(names)} containers are of no split by their names, so the "
        text += "splits of the others are not read; rename them, or use shard.val_source"
        return {}, (Note(text, is_doubtful=True),)
    if "val" not in kinds:
        split_of = {name: "val" if kind == "test" else kind for name, kind in split_of.items()}
    told = ", ".join(f"{kind} {count}" for kind, count in Counter(split_of.values()).items())
    return split_of, (Note(f"splits are the names of containers: {told}"),)


def _split(name: str) -> str:
    """The innermost part of a path that has a word of one split."""
    stem = _stem(name)
    for part in reversed(stem.split("/")):
        found = {split_of_word(word) for word in WORDS.findall(part)} - {""}
        if len(found) == 1:
            return found.pop()
        if found:
            return ""
    return ""


def _stem(name: str) -> str:
    suffix = next((s for s in CONTAINER_SUFFIXES if name.lower().endswith(s)), "")
    return name[: len(name) - len(suffix)]


def archive_class(name: str) -> str:
    """Class that an archive is called after."""
    base = _stem(name).rpartition("/")[2]
    return label_text(base) or printable(base)


def is_shard_numbering(names: Sequence[str]) -> bool:
    """Whether names of containers number the parts of one set, so that they are no classes.

    Those of each folder are looked at: one name, a split, words such as `shard`, or numbers without
    a gap behind the same text.
    """
    folders: dict[str, list[str]] = defaultdict(list)
    for name in names:
        folders[dirname(name)].append(_stem(name).rpartition("/")[2])
    return all(_is_numbering(stems) for stems in folders.values())


def _is_numbering(stems: Sequence[str]) -> bool:
    words = [set(WORDS.findall(stem.lower())) for stem in stems]
    if len(stems) == 1 or all(_is_of_a_set(found) for found in words):
        return True
    matches = [NUMBERED.fullmatch(stem) for stem in stems]
    found = [(match[1], int(match[2])) for match in matches if match]
    numbers = sorted(number for _, number in found)
    has_one_text = len({text for text, _ in found}) == 1 and len(found) == len(stems)
    return has_one_text and numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def _is_of_a_set(words: set[str]) -> bool:
    return bool(words & SHARD_WORDS) or any(split_of_word(word) for word in words)


def archive_note(names: Sequence[str], are_classes: bool) -> Note:
    """What was decided of archives in which images lie flat."""
    if are_classes:
        told = described(sorted({archive_class(name) for name in names}))
        text = f"classes are archives, because images lie flat in them: {told}; "
        text += "shard.classes_from=none takes all as one"
    else:
        text = f"{len(names)} archives are shards by their names, so they are no classes and images"
        text += " have none; shard.classes_from=archives makes them classes"
    return Note(printable(text), is_doubtful=True)
