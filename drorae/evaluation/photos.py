"""Photos of a task in batches: shards come in order, pictures are decoded ahead of the device."""

import contextlib
from collections.abc import Generator

import numpy as np

from drorae.data.images import ImageShards
from drorae.data.order import ShardUse
from drorae.data.prefetch import prefetched
from drorae.shapes import Int, Tensor, UInt8

__all__ = ["PhotoBatch", "photo_batches", "shard_uses"]

PhotoBatch = tuple[np.ndarray, UInt8[Tensor, "batch 3 height width"], Int[Tensor, " batch"]]
"""Ids, pictures and labels."""


def photo_batches(photos: ImageShards, ids: range, batch_images: int) -> Generator[PhotoBatch]:
    """The photos of consecutive ids, decoded by a thread while the batch before is in use.

    At most two batches are held beside the one in use. Shards are let go after their last batch.

    Args:
        photos: Where they lie; one task at a time.
        ids: Consecutive ids.
        batch_images: Photos in a batch; the last one may be smaller.
    """
    starts = ids[::batch_images]

    def read(start: int) -> PhotoBatch:
        rows = np.arange(start, min(start + batch_images, ids.stop))
        return rows, *photos.read(rows)

    photos.follow(shard_uses(photos.shard_rows, ids, batch_images))
    try:
        with contextlib.closing(prefetched(read, starts, 1)) as batches:
            for step, batch in enumerate(batches):
                photos.reached(step)
                yield batch
    finally:
        photos.reached(len(starts))


def shard_uses(shard_rows: tuple[int, ...], ids: range, batch_images: int) -> list[ShardUse]:
    """The shards that hold some consecutive ids; steps are batches, from 0.

    Args:
        shard_rows: Rows of each shard; ids count through them.
        ids: Consecutive ids.
        batch_images: Photos in a batch.
    """
    uses, end = [], 0
    for shard, rows in enumerate(shard_rows):
        first, end = max(end, ids.start), end + rows
        last = min(end, ids.stop) - 1
        if first <= last:
            steps = [(row - ids.start) // batch_images for row in (first, last)]
            uses.append(ShardUse(shard, *steps))
    return uses
