import contextlib
import threading

import numpy as np
import pytest
import torch

from drorae.data.order import ShardUse
from drorae.evaluation.photos import photo_batches, shard_uses


class FakePhotos:
    """Shards of three rows; notes what is asked of it."""

    shard_rows = (3, 3, 3)

    def __init__(self) -> None:
        self.uses: list[ShardUse] = []
        self.steps: list[int] = []
        self.began = {start: threading.Event() for start in range(9)}

    def read(self, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        self.began[int(ids[0])].set()
        return torch.zeros(len(ids), 3, 1, 1, dtype=torch.uint8), torch.from_numpy(ids % 2)

    def follow(self, uses: list[ShardUse]) -> None:
        self.uses = uses

    def reached(self, step: int) -> None:
        self.steps.append(step)


@pytest.mark.parametrize(
    ("ids", "uses"),
    [
        (range(9), [(0, 0, 1), (1, 1, 2), (2, 3, 4)]),
        (range(4, 8), [(1, 0, 0), (2, 1, 1)]),
        (range(3, 4), [(1, 0, 0)]),
    ],
)
def test_shards_are_named_with_their_first_and_last_batch(
    ids: range, uses: list[tuple[int, int, int]]
) -> None:
    assert shard_uses((3, 3, 3), ids, 2) == [ShardUse(*use) for use in uses]


def test_photos_come_in_order_with_their_shards_declared_and_let_go() -> None:
    photos = FakePhotos()
    batches = list(photo_batches(photos, range(2, 7), 2))
    assert [ids.tolist() for ids, _, _ in batches] == [[2, 3], [4, 5], [6]]
    assert [labels.tolist() for _, _, labels in batches] == [[0, 1], [0, 1], [0]]
    assert [use.shard for use in photos.uses] == [0, 1, 2]
    assert photos.steps == [0, 1, 2, 3]


def test_the_next_batch_is_decoded_while_one_is_in_use() -> None:
    photos = FakePhotos()
    with contextlib.closing(photo_batches(photos, range(9), 2)) as batches:
        next(batches)
        assert photos.began[2].wait(10)
    assert photos.steps == [0, 5]
