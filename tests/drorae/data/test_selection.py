import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from drorae.data.readers.candidates import Candidate
from drorae.data.selection import (
    Decoded,
    choose,
    even_quotas,
    hash_order,
    split_candidates,
)


def some(count: int, classes: int = 2) -> list[Candidate]:
    return [Candidate(f"k{i:03d}", f"c{i % classes}", "", "file", "f") for i in range(count)]


def good(candidates: list[Candidate]) -> dict[str, Decoded]:
    return {c.key: Decoded(f"sha-{c.key}") for c in candidates}


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 100))
def test_quotas_are_even_and_use_the_whole_cap(sizes: list[int], cap: int):
    named = {f"c{i}": size for i, size in enumerate(sizes)}
    quotas = even_quotas(named, cap)
    assert sum(quotas.values()) == min(cap, sum(sizes))
    assert all(0 <= quotas[name] <= named[name] for name in named)
    cut = [quotas[name] for name in named if quotas[name] < named[name]]
    assert not cut or max(quotas.values()) - min(cut) <= 1


def test_order_ignores_listing_order_and_survives_new_files():
    first = hash_order(some(50), seed=1)
    again = hash_order(reversed(some(50)), seed=1)
    more = [c for c in hash_order(some(80), seed=1) if c in first]
    assert first == again == more
    assert first != hash_order(some(50), seed=2)


def test_split_follows_the_fraction_and_never_changes_with_new_files():
    train, val = split_candidates(some(2000), seed=0, val_fraction=0.1)
    assert len(train) + len(val) == 2000
    assert abs(len(val) - 200) < 60
    assert set(val) <= set(split_candidates(some(3000), seed=0, val_fraction=0.1)[1])


def test_stated_splits_win():
    stated = [Candidate("a", "c", "val", "file", "f"), Candidate("b", "c", "train", "file", "f")]
    train, val = split_candidates(stated, seed=0, val_fraction=0.99)
    assert [c.key for c in train + val] == ["b", "a"]


def test_choice_waits_for_undecoded_candidates():
    ordered = hash_order(some(10), 0)
    choice = choose(ordered, {}, 4, {})
    assert choice.rows == choice.pending
    assert len(choice.rows) == 4


def test_rejected_candidates_are_replaced_within_their_class():
    ordered = hash_order(some(20), 0)
    first = choose(ordered, {}, 6, {}).rows
    decoded = good(first) | {first[0].key: Decoded("", reason="bad")}
    second = choose(ordered, decoded, 6, {})
    assert len(second.rows) == 6
    assert len(second.pending) == 1
    assert second.pending[0].class_name == first[0].class_name


def test_duplicates_keep_the_first_in_order():
    ordered = hash_order(some(6, classes=1), 0)
    decoded = good(ordered) | {ordered[i].key: Decoded("same") for i in (1, 3, 5)}
    choice = choose(ordered, decoded, None, {})
    assert choice.duplicates == {ordered[i].key: ordered[1].key for i in (3, 5)}
    assert len(choice.rows) == 4


def test_duplicates_of_the_other_split_are_left_out():
    ordered = hash_order(some(3, classes=1), 0)
    decoded = good(ordered) | {ordered[0].key: Decoded("same")}
    assert choose(ordered, decoded, None, {"same": "val/x"}).duplicates == {ordered[0].key: "val/x"}


def test_duplicates_may_be_kept():
    ordered = some(3, classes=1)
    decoded = {c.key: Decoded("same") for c in ordered}
    assert len(choose(ordered, decoded, None, None).rows) == 3


def test_capped_choice_is_the_prefix_of_each_class():
    ordered = hash_order(some(40, classes=4), 3)
    rows = choose(ordered, good(ordered), 8, {}).rows
    for name in {c.class_name for c in ordered}:
        of_class = [c for c in ordered if c.class_name == name]
        assert [c for c in rows if c.class_name == name] == of_class[:2]
    places = [ordered.index(c) for c in rows]
    assert np.all(np.diff(places) > 0)
