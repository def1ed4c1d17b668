import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drorae.data.statistics import Moments, RunningMoments


def moments_of(*batches: np.ndarray) -> Moments:
    running = RunningMoments(batches[0].shape[1:], torch.device("cpu"))
    for batch in batches:
        running.update(torch.from_numpy(batch))
    return running.result()


@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=6),
    st.floats(-1e4, 1e4),
    st.integers(0, 2**32 - 1),
)
def test_any_split_into_batches_gives_numpys_moments(sizes: list[int], offset: float, seed: int):
    values = np.random.default_rng(seed).normal(offset, 2.0, (sum(sizes) + 1, 2, 3))
    moments = moments_of(*np.split(values, np.cumsum(sizes)))
    assert moments.count == len(values)
    # float64 with an offset of 1e4 leaves about 1e-16 * 1e8 of a variance near 4
    np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.var, values.var(0), rtol=1e-6, atol=1e-9)


def test_merge_of_two_sets_is_the_set_of_both():
    values = np.random.default_rng(0).normal(size=(50, 4))
    left = moments_of(values[:20])
    right = moments_of(values[20:])
    np.testing.assert_allclose(left.merge(right).var, values.var(0), rtol=1e-12)


def test_merging_nothing_changes_nothing():
    empty = Moments.empty((3,))
    assert empty.merge(empty).count == 0


def test_float16_input_is_summed_in_float64():
    values = np.full((4096, 1), 2048, dtype=np.float16)
    assert moments_of(values).mean[0] == 2048


def test_errors_are_clear():
    with pytest.raises(ValueError, match="0 samples"):
        _ = Moments.empty((1,)).var
    with pytest.raises(ValueError, match="cannot be merged"):
        Moments.empty((1,)).merge(Moments.empty((2,)))
