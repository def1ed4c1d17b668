"""Which few images of a source are looked at: by hash, spread over splits, classes and containers.

The choice is a function of seed and keys alone. Parquet rows are only read with their row group, so
that rows of a few row groups stand for all of them.
"""

from typing import Any

import numpy as np

from drorae.data.checked import Candidates

__all__ = ["choose_sample"]

MAX_GROUP_ROWS = 2000
"""Rows of Parquet row groups that are read for a sample: 230 MB at ImageNet's size."""


def choose_sample(candidates: Candidates, num_images: int) -> np.ndarray:
    """Positions of the images of a sample, best spread first, int64.

    Every class of a split comes once before any comes twice, and every container of a class before
    it comes twice; else by hash. Grows as n log n, in arrays.

    Args:
        candidates: All candidates.
        num_images: Images wanted.
    """
    rows = np.flatnonzero(_is_near(candidates))
    is_val = np.zeros(len(candidates.rank), np.int64)
    is_val[candidates.orders["val"]] = 1
    classes = 2 * candidates.labels[rows].astype(np.int64) + is_val[rows]
    containers = _codes(candidates, "container")[rows]
    hashed = candidates.rank[rows]
    of_both = classes * (1 + containers.max(initial=0)) + containers
    turns = _turns(classes, (hashed, _turns(of_both, (hashed,))))
    return rows[np.lexsort((hashed, turns))[:num_images]]


def _turns(groups: np.ndarray, priority: tuple[np.ndarray, ...]) -> np.ndarray:
    """Place of each row among those of its group, from 0; the last priority counts first."""
    order = np.lexsort((*priority, groups))
    ordered = groups[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    lengths = np.diff(np.append(starts, len(ordered)))
    turns = np.empty(len(groups), np.int64)
    turns[order] = np.arange(len(groups)) - np.repeat(starts, lengths)
    return turns


def _is_near(candidates: Candidates) -> np.ndarray:
    """Which candidates can be read without much else: of Parquet, rows of a few row groups."""
    kinds: Any = candidates.listing.table["kind"].combine_chunks()
    names = kinds.dictionary.to_pylist()
    near = np.array([name != "parquet" for name in names], bool)[kinds.indices.to_numpy()]
    rows = np.flatnonzero(~near)
    if not len(rows):
        return near
    units = candidates.listing.table["unit"].to_numpy()[rows].astype(np.int64)
    groups = (_codes(candidates, "container")[rows] << 32) + units
    _, number, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    first = np.full(len(sizes), len(candidates.rank))
    np.minimum.at(first, number, candidates.rank[rows])
    order = np.argsort(first)
    fits = np.cumsum(sizes[order]) <= MAX_GROUP_ROWS
    fits[0] = True
    near[rows] = np.isin(number, order[fits])
    return near


def _codes(candidates: Candidates, name: str) -> np.ndarray:
    column: Any = candidates.listing.table[name].combine_chunks()
    return column.indices.to_numpy().astype(np.int64)
