"""Which candidates become rows, and in which order: by hash, never by listing or worker order.

The order is that of sha256(seed, key): adding files inserts rows and moves none past another. Under
a cap the first images of each class in that order are taken, spread over classes as evenly as their
sizes allow. Because bad and duplicate files are known only after they were checked, choosing is a
fixed point: choose, check what is new, choose again.

Candidates are numbers, positions in a listing; all here is arrays of about 8 bytes a candidate and
sorts, so time grows as n log n.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

UNKNOWN, BAD = -1, -2
"""Content of a candidate that was not checked yet, and of one that is rejected."""


@dataclass(frozen=True, slots=True)
class Choice:
    """State of one split after a round."""

    rows: np.ndarray
    """Chosen candidates in hash order."""
    pending: np.ndarray
    """Those of them that are not checked yet."""
    duplicates: np.ndarray
    """[n, 2]: a left-out candidate, and the one of equal content that is kept."""


def hash_fraction(seed: int, purpose: str, key: str) -> float:
    """Uniform number in [0, 1) that depends on seed, purpose and key alone."""
    return int.from_bytes(_hash(seed, purpose, key)[:6], "big") / 2**48


def _hash(seed: int, purpose: str, key: str) -> bytes:
    return hashlib.sha256(f"{purpose}/{seed}/{key}".encode()).digest()


def hash_order(keys: Iterable[str], seed: int) -> np.ndarray:
    """Positions of the keys in the order of sha256(seed, key), int64."""
    digests = b"".join(_hash(seed, "order", key)[:16] for key in keys)
    words = np.frombuffer(digests, ">u8").reshape(-1, 2)
    return np.lexsort((words[:, 1], words[:, 0])).astype(np.int64)


def val_mask(
    keys: Iterable[str], splits: Iterable[str], seed: int, val_fraction: float
) -> np.ndarray:
    """Which candidates are validation: by the split that a source states, else by hash."""
    return np.array(
        [
            split == "val" or (not split and hash_fraction(seed, "split", key) < val_fraction)
            for key, split in zip(keys, splits, strict=True)
        ],
        dtype=bool,
    )


def even_quotas(sizes: np.ndarray, cap: int | None) -> np.ndarray:
    """Rows of each class: as equal as the sizes allow, `min(cap, all)` in sum.

    A remainder that cannot be divided goes to the largest classes.
    """
    if cap is None or cap >= int(sizes.sum()):
        return sizes.copy()
    quotas, left = np.zeros_like(sizes), cap
    by_size = np.argsort(sizes, kind="stable")
    for position, label in enumerate(by_size):
        quotas[label] = min(int(sizes[label]), left // (len(by_size) - position))
        left -= int(quotas[label])
    return quotas


def choose(
    order: np.ndarray,
    labels: np.ndarray,
    content: np.ndarray,
    cap: int | None,
    kept_elsewhere: np.ndarray | None,
) -> Choice:
    """Choose the rows of one split from what is known so far.

    Args:
        order: Candidates of the split in hash order.
        labels: Class of every candidate, of either split; -1: none.
        content: Number of the content of every candidate, from 0; equal files have equal numbers.
            `UNKNOWN` counts as fine, `BAD` is left out.
        cap: Largest number of rows.
        kept_elsewhere: For every content number the candidate that another split keeps, or -1;
            none: duplicates are allowed.
    """
    usable = order[content[order] != BAD]
    is_left_out = np.zeros(len(content), bool)
    duplicates = [np.empty((0, 2), np.int64)]
    while True:
        rows = _capped(usable[~is_left_out[usable]], labels, cap)
        new = _duplicates(rows, content, kept_elsewhere)
        if not len(new):
            pending = rows[content[rows] == UNKNOWN]
            return Choice(rows, pending, np.concatenate(duplicates))
        is_left_out[new[:, 0]] = True
        duplicates.append(new)


def _capped(usable: np.ndarray, labels: np.ndarray, cap: int | None) -> np.ndarray:
    if cap is None or cap >= len(usable):
        return usable
    classes = labels[usable] + 1  # those without a label are a class of their own
    quotas = even_quotas(np.bincount(classes), cap)
    by_class = np.argsort(classes, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(classes))])
    rank = np.empty(len(usable), np.int64)
    rank[by_class] = np.arange(len(usable)) - first[classes[by_class]]
    return usable[rank < quotas[classes]]


def _duplicates(
    rows: np.ndarray, content: np.ndarray, kept_elsewhere: np.ndarray | None
) -> np.ndarray:
    known = rows[content[rows] >= 0]
    if kept_elsewhere is None or not len(known):
        return np.empty((0, 2), np.int64)
    numbers, first_row = np.unique(content[known], return_index=True)
    kept = kept_elsewhere.copy()
    kept[numbers] = np.where(kept[numbers] < 0, known[first_row], kept[numbers])
    keeper = kept[content[known]]
    left_out = keeper != known
    return np.stack([known[left_out], keeper[left_out]], axis=1)
