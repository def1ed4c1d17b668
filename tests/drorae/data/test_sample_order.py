import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drorae.data.sample_order import batch_ids, position, rank_slice, steps_per_epoch


@given(st.integers(1, 200), st.integers(1, 50), st.integers(0, 5))
def test_an_epoch_shows_each_sample_at_most_once(num_samples: int, batch: int, epoch: int):
    batch = min(batch, num_samples)
    steps = steps_per_epoch(num_samples, batch)
    ids = np.concatenate([batch_ids(7, epoch, s, num_samples, batch) for s in range(steps)])
    assert len(set(ids.tolist())) == len(ids) == steps * batch
    assert ids.min() >= 0
    assert ids.max() < num_samples


def epoch_ids(epoch: int, num_samples: int, batch: int) -> list[int]:
    steps = steps_per_epoch(num_samples, batch)
    parts = [batch_ids(3, epoch, s, num_samples, batch) for s in range(steps)]
    return np.concatenate(parts).tolist()


def test_a_batch_that_divides_the_data_leaves_nobody_out():
    for epoch in range(5):
        assert sorted(epoch_ids(epoch, 24, 8)) == list(range(24))


def test_the_remainder_is_another_one_in_every_epoch_and_nobody_is_left_out_for_ever():
    num_samples, batch, epochs = 23, 8, 200
    left_out = np.zeros(num_samples, dtype=int)
    for epoch in range(epochs):
        ids = epoch_ids(epoch, num_samples, batch)
        assert len(ids) == len(set(ids)) == 16
        left_out[sorted(set(range(num_samples)) - set(ids))] += 1
    # 7 of 23 sit out, so each does so about 61 times of 200, standard deviation 6.5
    assert left_out.min() > 61 - 5 * 6.5
    assert left_out.max() < 61 + 5 * 6.5


def test_ranks_together_see_the_global_batch():
    ids = batch_ids(0, 1, 2, 100, 12)
    for world_size in (1, 2, 3, 4):
        parts = [rank_slice(ids, rank, world_size) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(parts), ids)


def test_order_is_a_fixed_function():
    # Written down once: a change would silently break the continuation of old runs.
    np.testing.assert_array_equal(batch_ids(0, 0, 0, 10, 10), FIRST_EPOCH)


def test_epochs_and_seeds_differ():
    first = batch_ids(0, 0, 0, 100, 100)
    assert not np.array_equal(first, batch_ids(0, 1, 0, 100, 100))
    assert not np.array_equal(first, batch_ids(1, 0, 0, 100, 100))


def test_changing_a_batch_in_place_changes_nothing_else():
    batch_ids(0, 0, 0, 10, 5)[:] = -1
    assert batch_ids(0, 0, 0, 10, 5).min() >= 0


def test_position_counts_dropped_remainders():
    assert position(0, 10, 4) == (0, 0)
    assert position(2, 10, 4) == (1, 0)
    assert position(7, 10, 4) == (3, 1)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: steps_per_epoch(3, 4), "does not fit 3 samples"),
        (lambda: position(-1, 10, 2), "step=-1"),
        (lambda: batch_ids(0, 0, 5, 10, 2), "expected 0 to 4"),
        (lambda: rank_slice(np.arange(10), 0, 4), "use a batch of 8 or 12"),
        (lambda: rank_slice(np.arange(10), 5, 5), "rank 5"),
    ],
)
def test_impossible_requests_are_told(call, match: str):
    with pytest.raises(ValueError, match=match):
        call()


FIRST_EPOCH = [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
