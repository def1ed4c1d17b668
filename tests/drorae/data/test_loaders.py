import gc
import itertools
import threading
import time
import zlib
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drorae.data.jobs import OrderConfig
from drorae.data.loaders import crop_batches, flips, latent_batches, tokenizer_batches
from drorae.data.order import ShardUse, epoch_ids
from drorae.data.prefetch import prefetched

ROWS = (5, 5, 2)
ORDER = OrderConfig(streams=2, window_shards=1)


class FakeShards:
    """Twelve samples whose numbers are their id; remembers what it is asked to fetch."""

    def __init__(self, has_flip: bool = False) -> None:
        self.has_flip = has_flip
        self.shard_rows = ROWS
        self.plans: list[list[ShardUse]] = []
        self.steps: list[int] = []

    def follow(self, uses: Iterable[ShardUse]) -> None:
        self.plans.append(list(uses))

    def reached(self, step: int) -> None:
        self.steps.append(step)


class FakeImages(FakeShards):
    def read(self, ids: np.ndarray):
        values = torch.from_numpy(ids).to(torch.uint8)
        return values.view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous(), torch.from_numpy(ids)


class FakeCrops(FakeShards):
    def read(self, ids: np.ndarray, epoch: int):
        values = torch.from_numpy(ids + 100 * epoch).to(torch.uint8)
        return values.view(-1, 1, 1, 1).expand(-1, 3, 2, 2), torch.from_numpy(ids)


class FakeHidden:
    def read(self, ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(ids).view(-1, 1, 1, 1).to(torch.float16)


class FakeLatents(FakeShards):
    shape = (1, 1, 1)

    def read(self, ids: np.ndarray, flip: np.ndarray | None = None, out=None):
        values = torch.from_numpy(ids).half()
        if flip is not None:
            values = torch.where(torch.from_numpy(flip), -values, values)
        values = values.view(-1, *self.shape)
        return values if out is None else out.copy_(values), torch.from_numpy(ids)


def tokens(**changes):
    options = {"seed": 0, "num_steps": 7, "global_batch": 4, "order": ORDER, "threads": 2}
    return list(tokenizer_batches(FakeImages(), FakeHidden(), **{**options, **changes}))


def test_batches_are_those_of_the_order():
    for batch in tokens():
        epoch, inner = divmod(batch.step, 3)
        assert batch.epoch == epoch
        np.testing.assert_array_equal(batch.ids, epoch_ids(0, epoch, ROWS, 4, 2, 1)[inner])


@pytest.mark.parametrize("start", range(7))
def test_resumed_batches_are_those_of_an_uninterrupted_run(start: int):
    whole, resumed = tokens(), tokens(start_step=start)
    assert [b.step for b in resumed] == list(range(start, 7))
    for a, b in zip(whole[start:], resumed, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)


def test_images_hidden_and_labels_belong_together():
    for batch in tokens():
        assert batch.images[:, 0, 0, 0].tolist() == batch.ids.tolist()
        assert batch.hidden.flatten().tolist() == batch.ids.tolist() == batch.labels.tolist()
        assert (batch.images.dtype, batch.hidden.dtype) == (torch.uint8, torch.float16)


def test_crops_are_those_of_the_epoch_and_bring_no_hidden_states():
    for batch in crop_batches(FakeCrops(), seed=0, num_steps=7, global_batch=4):
        assert batch.hidden is None
        assert batch.images[:, 0, 0, 0].tolist() == [i + 100 * batch.epoch for i in batch.ids]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_one_worker(world_size: int):
    alone = tokens()
    ranks = [tokens(rank=r, world_size=world_size) for r in range(world_size)]
    for step, batch in enumerate(alone):
        together = np.concatenate([r[step].ids for r in ranks])
        np.testing.assert_array_equal(together, batch.ids)
        positions = torch.cat([r[step].positions for r in ranks])
        assert positions.tolist() == [0, 1, 2, 3]
        assert {r[step].ids_digest for r in ranks} == {zlib.crc32(batch.ids.tobytes())}


@given(st.integers(0, 6), st.sampled_from([1, 2, 4]), st.data())
@settings(deadline=None)
def test_a_rank_follows_the_shards_of_its_part(start: int, world_size: int, data: st.DataObject):
    rank, reader = data.draw(st.integers(0, world_size - 1)), FakeLatents()
    options = {"seed": 0, "num_steps": 7, "global_batch": 4, "order": ORDER}
    part = {"start_step": start, "rank": rank, "world_size": world_size}
    batches = list(latent_batches(reader, **options, **part))
    plan, end = reader.plans
    assert end == []
    assert reader.steps == [b.step for b in batches] == list(range(start, 7))
    shard_of = np.repeat(np.arange(3), ROWS)
    used = [(b.epoch, s, b.step) for b in batches for s in shard_of[b.ids].tolist()]
    assert {(use.first_step // 3, use.shard) for use in plan} == {(e, s) for e, s, _ in used}
    for use in plan:
        steps = [step for e, s, step in used if (e, s) == (use.first_step // 3, use.shard)]
        assert (use.first_step, use.last_step) == (min(steps), max(steps))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"world_size": 3}, "does not divide over 3 workers"),
        ({"global_batch": 13}, "does not fit 12 samples"),
        ({"order": OrderConfig(streams=3)}, "does not divide over 3 streams"),
    ],
)
def test_impossible_batches_are_refused_before_the_first(changes, match: str):
    options = {"seed": 0, "num_steps": 1, "global_batch": 4, **changes}
    with pytest.raises(ValueError, match=match):
        latent_batches(FakeLatents(), **options)


def test_latents_are_mirrored_by_a_fair_coin_of_epoch_and_id():
    plain = list(latent_batches(FakeLatents(False), seed=0, num_steps=3, global_batch=4))
    assert all((b.latents >= 0).all() for b in plain)
    first = list(latent_batches(FakeLatents(True), seed=0, num_steps=3, global_batch=4))
    again = list(latent_batches(FakeLatents(True), seed=0, num_steps=3, global_batch=2))
    sign = {abs(v): v for b in first for v in b.latents.flatten().tolist()}
    assert any(v < 0 for v in sign.values())
    for batch in again:
        for value in batch.latents.flatten().tolist():
            assert sign[abs(value)] == value


def test_coins_are_fair_change_with_the_epoch_and_are_a_fixed_function():
    ids = np.arange(4000)
    first, second = flips(0, 0, ids), flips(0, 1, ids)
    assert abs(first.mean() - 0.5) < 0.04
    assert abs((first == second).mean() - 0.5) < 0.04
    # Written down once: a change would silently break the continuation of old runs.
    assert np.packbits(flips(0, 0, ids[:64])).tobytes().hex() == COINS


def test_errors_reach_the_consumer_at_their_step():
    def fail(step: int) -> int:
        if step == 2:
            raise RuntimeError("broken shard")
        return step

    batches = prefetched(fail, range(5), 3)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(RuntimeError, match="broken shard"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_items_keep_their_order_whichever_thread_is_first():
    def make(step: int) -> int:
        time.sleep(0.02 * (step % 3 == 0))
        return step

    assert list(prefetched(make, range(3, 20), 4)) == list(range(3, 20))


def test_threads_work_at_the_same_time():
    meet = threading.Barrier(3, timeout=10)
    assert len({*prefetched(lambda step: meet.wait() >= 0 and step, range(3), 3)}) == 3


def test_few_items_are_made_ahead():
    made = []
    batches = prefetched(lambda step: made.append(step) or step, range(1000), 2)
    for step in range(20):
        assert next(batches) == step
        assert len(made) <= step + 1 + 4
    batches.close()
    assert len(made) < 30


def loader_threads() -> int:
    return sum(t.name.startswith("batches") for t in threading.enumerate())


def test_a_dropped_iterator_stops_its_threads_and_downloads():
    reader = FakeLatents()
    batches = latent_batches(reader, seed=0, num_steps=500, global_batch=4, threads=3)
    assert [b.step for b in itertools.islice(batches, 2)] == [0, 1]
    assert loader_threads() > 0
    del batches
    gc.collect()
    assert loader_threads() == 0
    assert reader.plans[1:] == [[]]


@pytest.mark.gpu
def test_pinned_batches_are_equal_to_others():
    options = {"seed": 0, "num_steps": 3, "global_batch": 4}
    plain = latent_batches(FakeLatents(True), **options)
    fixed = latent_batches(FakeLatents(True), **options, pin=True, threads=2)
    for a, b in zip(plain, fixed, strict=True):
        assert b.latents.is_pinned()
        assert b.labels.is_pinned()
        assert (a.latents == b.latents).all()


COINS = "b632133c5baff740"
