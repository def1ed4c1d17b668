import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drorae.data.draws import host_uniform, philox

KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
"""Counter, key and words of philox4x32-10 in the test file of its authors (Random123)."""


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_the_generator_gives_its_authors_answers(counter, key, expected):
    words = philox(tuple(np.uint64(word) for word in counter), key)
    assert [int(word) for word in words] == list(expected)


def test_draws_are_a_fixed_function():
    # Written down once: a change would silently break the continuation of old runs.
    drawn = host_uniform(0, "crop", 1, np.array([0, 1, 2**40]), 3)
    assert drawn.tolist() == FIXED


@given(st.integers(0, 2**63), st.integers(0, 100), st.lists(st.integers(0, 2**62), max_size=9))
def test_a_draw_depends_on_seed_stream_epoch_and_id_alone(seed: int, epoch: int, ids: list[int]):
    together = host_uniform(seed, "s", epoch, np.array(ids, dtype=np.int64), 3)
    assert together.shape == (len(ids), 3)
    for number, row in zip(ids, together, strict=True):
        alone = host_uniform(seed, "s", epoch, np.array([number]), 2)
        np.testing.assert_array_equal(alone[0], row[:2])


def test_seeds_streams_epochs_ids_and_columns_are_independent():
    ids = np.arange(10_000)
    first = host_uniform(0, "a", 0, ids, 2)
    others = [
        host_uniform(1, "a", 0, ids, 1)[:, 0],
        host_uniform(0, "b", 0, ids, 1)[:, 0],
        host_uniform(0, "a", 1, ids, 1)[:, 0],
        np.roll(first[:, 0], 1),
        first[:, 1],
    ]
    for other in others:  # a correlation of 10,000 pairs has a deviation of 0.01
        assert abs(np.corrcoef(first[:, 0], other)[0, 1]) < 0.05


def test_draws_are_uniform_on_the_half_open_interval():
    drawn = host_uniform(0, "a", 0, np.arange(32_000), 1)[:, 0]
    assert 0 <= drawn.min() < drawn.max() < 1
    counts = np.bincount((drawn * 32).astype(int), minlength=32)
    # 1,000 expected in each of 32 bins: chi-squared of 31 degrees is below 70 but once in 10,000.
    assert ((counts - 1000) ** 2 / 1000).sum() < 70


FIXED = [
    [0.5326654851514082, 0.7248861864079262, 0.0774526840212365],
    [0.5932073535889908, 0.9609299180190698, 0.7300691202022421],
    [0.98843841885829, 0.6278538292191616, 0.5629722740340268],
]
