import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from drorae.data.selection import BAD, UNKNOWN, choose, even_quotas, hash_order, val_mask


def keys(count: int) -> list[str]:
    return [f"k{i:03d}" for i in range(count)]


def some(count: int, classes: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order, labels and contents (all different) of so many candidates."""
    return hash_order(keys(count), seed), np.arange(count) % classes, np.arange(count)


def nothing_kept(count: int) -> np.ndarray:
    return np.full(count, -1)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 100))
def test_quotas_are_even_and_use_the_whole_cap(sizes: list[int], cap: int):
    quotas = even_quotas(np.array(sizes), cap)
    assert quotas.sum() == min(cap, sum(sizes))
    assert np.all((quotas >= 0) & (quotas <= sizes))
    cut = quotas[quotas < sizes]
    assert not len(cut) or quotas.max() - cut.min() <= 1


def test_order_is_that_of_the_digests_and_survives_new_files():
    order = [keys(50)[i] for i in hash_order(keys(50), seed=1)]
    digests = {key: hashlib.sha256(f"order/1/{key}".encode()).digest() for key in keys(50)}
    assert order == sorted(keys(50), key=lambda key: digests[key])
    backwards = keys(50)[::-1]
    assert [backwards[i] for i in hash_order(backwards, seed=1)] == order
    more = [keys(80)[i] for i in hash_order(keys(80), seed=1)]
    assert [key for key in more if key in order] == order
    assert [keys(50)[i] for i in hash_order(keys(50), seed=2)] != order


def test_split_follows_the_fraction_and_never_changes_with_new_files():
    is_val = val_mask(keys(2000), [""] * 2000, seed=0, val_fraction=0.1)
    assert abs(is_val.sum() - 200) < 60
    more = val_mask(keys(3000), [""] * 3000, seed=0, val_fraction=0.1)
    np.testing.assert_array_equal(more[:2000], is_val)


def test_stated_splits_win():
    stated = ["val", "train"]
    assert val_mask(["a", "b"], stated, seed=0, val_fraction=0.99).tolist() == [True, False]


def test_choice_waits_for_unchecked_candidates():
    order, labels, _ = some(10)
    choice = choose(order, labels, np.full(10, UNKNOWN), 4, nothing_kept(1))
    assert choice.rows.tolist() == choice.pending.tolist()
    assert len(choice.rows) == 4


def test_rejected_candidates_are_replaced_within_their_class():
    order, labels, content = some(20)
    unknown = np.full(20, UNKNOWN)
    first = choose(order, labels, unknown, 6, nothing_kept(20)).rows
    unknown[first] = content[first]
    unknown[first[0]] = BAD
    second = choose(order, labels, unknown, 6, nothing_kept(20))
    assert len(second.rows) == 6
    assert len(second.pending) == 1
    assert labels[second.pending[0]] == labels[first[0]]


def test_duplicates_keep_the_first_in_order():
    order, labels, content = some(6, classes=1)
    content[order[[3, 5]]] = content[order[1]]
    choice = choose(order, labels, content, None, nothing_kept(6))
    assert choice.duplicates.tolist() == [[order[i], order[1]] for i in (3, 5)]
    assert len(choice.rows) == 4


def test_duplicates_of_the_other_split_are_left_out():
    order, labels, content = some(3, classes=1)
    kept = nothing_kept(3)
    kept[content[order[0]]] = 7
    assert choose(order, labels, content, None, kept).duplicates.tolist() == [[order[0], 7]]


def test_a_duplicate_under_a_cap_is_replaced():
    order, labels, content = some(6, classes=1)
    content[order[1]] = content[order[0]]
    choice = choose(order, labels, content, 3, nothing_kept(6))
    assert choice.rows.tolist() == order[[0, 2, 3]].tolist()


def test_duplicates_may_be_kept():
    order, labels, content = some(3, classes=1)
    assert len(choose(order, labels, np.zeros_like(content), None, None).rows) == 3


def test_capped_choice_is_the_prefix_of_each_class():
    order, labels, content = some(40, classes=4, seed=3)
    rows = choose(order, labels, content, 8, nothing_kept(40)).rows
    for label in range(4):
        of_class = order[labels[order] == label]
        assert rows[labels[rows] == label].tolist() == of_class[:2].tolist()
    places = [order.tolist().index(row) for row in rows]
    assert np.all(np.diff(places) > 0)


def test_no_candidates_give_no_rows():
    empty = np.empty(0, np.int64)
    assert not len(choose(empty, empty, empty, 5, nothing_kept(1)).rows)
