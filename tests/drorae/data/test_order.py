import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drorae.data.order import (
    ShardUse,
    epoch_ids,
    node_plan,
    position,
    rank_slice,
    steps_per_epoch,
)

IMAGENET_ROWS = (1024,) * 1251 + (1281167 - 1251 * 1024,)
STREAMS, BATCH, WINDOW = 64, 256, 4


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int, int]:
    """Rows of shards, a batch that fits them, streams that divide it, a window."""
    rows = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=9)))
    streams = draw(st.integers(1, min(8, sum(rows))))
    batch = streams * draw(st.integers(1, sum(rows) // streams))
    return rows, batch, streams, draw(st.integers(0, 4))


def shards_of(rows: tuple[int, ...], ids: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(rows)), rows)[ids]


@given(layouts(), st.integers(0, 2**40), st.integers(0, 5))
def test_an_epoch_shows_whole_batches_of_different_samples(layout, seed: int, epoch: int):
    rows, batch, *_ = layout
    ids = epoch_ids(seed, epoch, *layout)
    assert ids.dtype == np.int64
    assert ids.shape == (sum(rows) // batch, batch)
    assert len(np.unique(ids)) == ids.size
    assert ids.min() >= 0
    assert ids.max() < sum(rows)


@pytest.mark.parametrize("window", [0, 1, 2, 9])
def test_a_batch_that_divides_the_data_leaves_nobody_out(window: int):
    for epoch in range(5):
        assert sorted(epoch_ids(3, epoch, (7, 7, 7, 3), 8, 4, window).ravel()) == list(range(24))


def test_every_row_sits_out_with_the_same_chance():
    rows, epochs = (9, 9, 5), 2000
    left_out = np.full(sum(rows), epochs)
    for epoch in range(epochs):
        left_out[epoch_ids(3, epoch, rows, 8, 2, 1).ravel()] -= 1
    assert left_out.sum() == 7 * epochs
    # 7 of 23 rows sit out: about 609 times of 2,000, standard deviation 21; five of them.
    assert abs(left_out - 7 / 23 * epochs).max() < 105


@pytest.mark.parametrize("world_size", [1, 2, 8, 64])
def test_ranks_together_see_the_global_batch(world_size: int):
    for ids in epoch_ids(0, 1, (500, 500, 77), 64, 16, 1):
        parts = [rank_slice(ids, rank, world_size) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(parts), ids)


@pytest.mark.parametrize("window", [0, 1, 2])
def test_a_stream_reads_a_contiguous_part_of_the_shards(window: int):
    rows, streams, batch = (50,) * 19 + (23,), 4, 8
    by_stream = epoch_ids(5, 2, rows, batch, streams, window).reshape(-1, streams, batch // streams)
    touched = [set(shards_of(rows, by_stream[:, s]).ravel()) for s in range(streams)]
    # 973 rows in four streams: five shards each, and one that is cut at each of its two ends.
    assert max(len(shards) for shards in touched) <= 7
    # Each stream shares one shard with the next, the last one with the first.
    shared = sum(len(a & b) for a, b in itertools.combinations(touched, 2))
    assert shared <= streams


def test_a_window_bounds_how_far_a_row_moves():
    rows, window = (10,) * 30, 2
    ids = epoch_ids(1, 0, rows, 1, 1, window).ravel()
    shards = shards_of(rows, ids)
    spans = [np.ptp(np.flatnonzero(shards == shard)) for shard in range(30)]
    # The turn may put one shard at both ends; the others stay within the window and their rows.
    assert sorted(spans)[-2] < (window + 1) * 10
    assert np.mean(spans) > 10


@pytest.mark.parametrize("window", [0, 4, 100])
def test_a_window_over_the_whole_stream_is_a_uniform_permutation(window: int):
    counts = np.zeros((12, 12), dtype=int)
    for epoch in range(3000):
        counts[np.arange(12), epoch_ids(0, epoch, (3,) * 4, 12, 1, window)[0]] += 1
    # 250 in every cell, standard deviation 15
    assert abs(counts - 250).max() < 5 * 15


def test_order_is_a_fixed_function():
    # Written down once: a change would silently break the continuation of old runs.
    assert epoch_ids(0, 0, (10,), 10, 1, 0)[0].tolist() == FIRST_EPOCH
    windowed = epoch_ids(7, 3, (100,) * 12 + (31,), 32, 8, 2)
    assert hashlib.sha256(windowed.tobytes()).hexdigest() == WINDOWED_SHA256


def test_epochs_and_seeds_differ():
    first = epoch_ids(0, 0, (50, 50), 10, 2, 1)
    assert not np.array_equal(first, epoch_ids(0, 1, (50, 50), 10, 2, 1))
    assert not np.array_equal(first, epoch_ids(1, 0, (50, 50), 10, 2, 1))


def test_position_counts_dropped_remainders():
    assert position(0, 10, 4) == (0, 0)
    assert position(2, 10, 4) == (1, 0)
    assert position(7, 10, 4) == (3, 1)


@given(layouts(), st.data())
def test_a_plan_names_the_shards_of_a_slice_once_an_epoch_in_order(layout, data: st.DataObject):
    rows, batch, *_ = layout
    per_epoch = sum(rows) // batch
    first = data.draw(st.integers(0, 3 * per_epoch))
    steps = range(first, first + data.draw(st.integers(0, 2 * per_epoch)))
    left = data.draw(st.integers(0, batch - 1))
    positions = range(left, data.draw(st.integers(left + 1, batch)))
    expected: dict[tuple[int, int], ShardUse] = {}  # by (epoch, shard)
    for step in steps:
        epoch, inner = divmod(step, per_epoch)
        ids = epoch_ids(0, epoch, *layout)[inner]
        for shard in shards_of(rows, ids[positions.start : positions.stop]).tolist():
            use = expected.get((epoch, shard), ShardUse(shard, step, step))
            expected[epoch, shard] = ShardUse(shard, use.first_step, step)
    plan = list(node_plan(0, *layout, positions=positions, steps=steps))
    assert plan == list(expected.values())


def test_a_plan_of_many_epochs_costs_nothing_until_it_is_read():
    plan = node_plan(0, (10,) * 10, 10, 1, 0, positions=range(10), steps=range(10**15))
    first = list(itertools.islice(plan, 25))
    assert [use.shard for use in first[:10]] != list(range(10))
    assert sorted(use.shard for use in first[:10]) == list(range(10))
    assert first[10].first_step == 10


@pytest.fixture(scope="module")
def imagenet_epoch() -> np.ndarray:
    return epoch_ids(0, 1, IMAGENET_ROWS, BATCH, STREAMS, WINDOW)


def test_shuffling_at_the_size_of_imagenet_is_as_good_as_the_docs_say(imagenet_epoch):
    shards = shards_of(IMAGENET_ROWS, imagenet_epoch[::10])
    counts = np.stack([np.bincount(row, minlength=len(IMAGENET_ROWS)) for row in shards])
    assert 172 < (counts > 0).sum(axis=1).mean() < 178
    of_random_rows = BATCH * (BATCH - 1) * 1024 / sum(IMAGENET_ROWS)
    assert 3.6 < (counts * (counts - 1)).sum(axis=1).mean() / of_random_rows < 4.0


def test_nodes_share_few_shards_at_the_size_of_imagenet(imagenet_epoch):
    shards = shards_of(IMAGENET_ROWS, imagenet_epoch)
    for nodes, most in ((1, 1.0), (8, 1.007), (16, 1.013)):
        parts = np.split(shards, nodes, axis=1)
        reads = sum(len(np.unique(part)) for part in parts) / len(IMAGENET_ROWS)
        assert 1.0 <= reads <= most


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: steps_per_epoch(3, 4), "does not fit 3 samples"),
        (lambda: position(-1, 10, 2), "step=-1"),
        (lambda: epoch_ids(0, 0, (3,), 4, 1, 0), "does not fit 3 samples"),
        (lambda: epoch_ids(0, 0, (30,), 8, 3, 0), "order.streams to divide it"),
        (lambda: rank_slice(np.arange(10), 0, 4), "use a batch of 8 or 12"),
        (lambda: rank_slice(np.arange(10), 5, 5), "rank 5"),
    ],
)
def test_impossible_requests_are_refused(call, match: str):
    with pytest.raises(ValueError, match=match):
        call()


FIRST_EPOCH = [2, 1, 9, 8, 5, 4, 3, 0, 6, 7]
WINDOWED_SHA256 = "5ebbc2dbe7e287d237d3ca1745d5e298fa39ef9a55d16af08959032acf6f0e6e"
