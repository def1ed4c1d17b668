import gc
import threading
import time
import zlib

import numpy as np
import pytest
import torch

from drorae.data.loaders import flips, latent_batches, tokenizer_batches
from drorae.data.prefetch import Batches


class FakeImages:
    """Twelve images whose pixels are their id."""

    def __len__(self) -> int:
        return 12

    def read(self, ids: np.ndarray):
        values = torch.from_numpy(ids).to(torch.uint8)
        return values.view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous(), torch.from_numpy(ids)


class FakeHidden:
    def read(self, ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(ids).view(-1, 1, 1, 1).to(torch.float16)


class FakeLatents:
    def __init__(self, has_flip: bool) -> None:
        self.has_flip = has_flip

    def __len__(self) -> int:
        return 12

    def read(self, ids: np.ndarray, flip: np.ndarray | None = None):
        values = torch.from_numpy(ids).float()
        if flip is not None:
            values = torch.where(torch.from_numpy(flip), -values, values)
        return values.view(-1, 1, 1, 1), torch.from_numpy(ids)


def tokens(**changes):
    options = {"seed": 0, "num_steps": 7, "global_batch": 4, **changes}
    return list(tokenizer_batches(FakeImages(), FakeHidden(), **options))


def test_resumed_batches_are_those_of_an_uninterrupted_run():
    whole, resumed = tokens(), tokens(start_step=3)
    assert [b.step for b in resumed] == [3, 4, 5, 6]
    for a, b in zip(whole[3:], resumed, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)


def test_images_hidden_and_labels_belong_together():
    for batch in tokens():
        torch.testing.assert_close(batch.images[:, 0, 0, 0] * 255, torch.tensor(batch.ids).float())
        assert batch.hidden.flatten().tolist() == batch.ids.tolist() == batch.labels.tolist()
        assert batch.hidden.dtype == batch.images.dtype == torch.float32


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


def test_impossible_batches_are_told_before_the_first():
    with pytest.raises(ValueError, match="does not divide over 3 workers"):
        tokenizer_batches(
            FakeImages(), FakeHidden(), seed=0, num_steps=1, global_batch=4, world_size=3
        )
    with pytest.raises(ValueError, match="does not fit 12 samples"):
        latent_batches(FakeLatents(False), seed=0, num_steps=1, global_batch=13)


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


def test_coins_are_fair_and_change_with_the_epoch():
    ids = np.arange(4000)
    first, second = flips(0, 0, ids), flips(0, 1, ids)
    assert abs(first.mean() - 0.5) < 0.04
    assert abs((first == second).mean() - 0.5) < 0.04


def test_errors_reach_the_consumer():
    def fail(step: int) -> int:
        if step == 2:
            raise RuntimeError("broken shard")
        return step

    batches = Batches(fail, 0, 5)
    assert next(batches) == 0
    assert next(batches) == 1
    with pytest.raises(RuntimeError, match="broken shard"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_waiting_is_measured():
    def slow(step: int) -> int:
        time.sleep(0.05)
        return step

    with Batches(slow, 0, 2) as batches:
        assert list(batches) == [0, 1]
    assert batches.wait_s > 0.04


def loader_threads() -> int:
    return sum(t.name == "batches" for t in threading.enumerate())


def test_a_dropped_iterator_stops_its_thread():
    batches = latent_batches(FakeLatents(False), seed=0, num_steps=1000, global_batch=4)
    next(batches)
    assert loader_threads() == 1
    del batches
    gc.collect()
    assert loader_threads() == 0
