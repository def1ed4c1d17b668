"""Words in the names of folders and containers that mean a split.

A folder is a split if it is called so (`train`), or, among folders that all have the same other
words, if one of its words means one: `seg_train` and `seg_test`, `train2017` and `val2017`.
"""

import re
from collections.abc import Collection

__all__ = ["split_of_word", "splits_of_folders"]

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}
"""Names of folders and shards that mean a split."""

LETTERS = re.compile(r"[^\W\d_]+")


def split_of_word(word: str) -> str:
    """`train`, `val` or `test` when a word means a split, else empty."""
    return SPLIT_WORDS.get(word.lower(), "")


def splits_of_folders(names: Collection[str]) -> dict[str, str]:
    """Split of each folder that is one; empty unless one is `train` and another is not."""
    exact = {name: split_of_word(name) for name in names if split_of_word(name)}
    if _has_two(exact):
        return exact
    found = {name: split for name in names if (split := _split_inside(name))}
    others = {frozenset(_words(name) - SPLIT_WORDS.keys()) for name in found}
    return found if _has_two(found) and len(others) == 1 else {}


def _has_two(split_of: dict[str, str]) -> bool:
    kinds = set(split_of.values())
    return "train" in kinds and len(kinds) > 1


def _words(name: str) -> set[str]:
    return set(LETTERS.findall(name.lower()))


def _split_inside(name: str) -> str:
    """The one split of which a name has a word."""
    found = {split_of_word(word) for word in _words(name)} - {""}
    return found.pop() if len(found) == 1 else ""
