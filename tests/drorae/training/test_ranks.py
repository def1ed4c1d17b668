"""Loops on several ranks and in parts, in processes of their own."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from loop_fakes import SAMPLES
from rank_fakes import BATCH, Outcome, Task, start
from torch import Tensor
from torch.multiprocessing import ProcessExitedException

from drorae.config import Compute

NAMES = ("decoder", "fusion", "finetune", "diffusion")
ONE = Compute(log_every_steps=1, save_every_steps=3)


def variants(**changes: Any) -> list[Task]:
    # So low a rate that AdamW, whose first step is a sign, does not blow up differences of rounding
    # before the second step, in which the discriminator guides.
    compute = replace(ONE, **changes)
    return [Task(name=name, num_steps=2, lr=1e-6, compute=compute) for name in NAMES]


@pytest.fixture(scope="module")
def alone() -> dict[str, Outcome]:
    """Two steps of each loop on one rank, without parts."""
    return dict(zip(NAMES, start(*variants()), strict=True))


def assert_alike(found: Outcome, expected: Outcome, tolerance: float = 1e-5) -> None:
    """Gradients of the last step and losses of all agree; the former relative to their norm."""
    for ours, theirs in ((found.gradients, expected.gradients), (found.judge, expected.judge)):
        assert ours.keys() == theirs.keys()
        scale = norm(theirs)
        for name, gradient in theirs.items():
            assert norm({name: ours[name] - gradient}) <= tolerance * scale, name
    for name in (
        "train/loss",
        "train/gan_weight",
        "train/grad_norm",
        "eval/psnr_db",
        "eval_online/psnr_db",
    ):
        assert found.series(name).keys() == expected.series(name).keys()
        for step, value in expected.series(name).items():
            # The weight is a ratio of two norms, each with rounding errors of its own.
            assert math.isclose(found.series(name)[step], value, rel_tol=5 * tolerance), name


def norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in tensors.values()))


def test_parts_of_a_batch_give_the_gradients_of_the_whole(alone: dict[str, Outcome]) -> None:
    for name, found in zip(NAMES, start(*variants(accumulate_steps=2)), strict=True):
        assert_alike(found, alone[name])


@pytest.mark.slow
def test_two_ranks_with_and_without_shards_or_parts_give_the_gradients_of_one(
    alone: dict[str, Outcome],
) -> None:
    tasks = [
        *variants(),
        *variants(accumulate_steps=2),
        *variants(sharding="fsdp2"),
        *variants(sharding="fsdp2", accumulate_steps=4, activation_checkpointing=True),
        *variants(sharding="fsdp2", compile=True)[::3],
    ]
    for task, found in zip(tasks, start(*tasks, world_size=2), strict=True):
        assert_alike(found, alone[task.name])
        assert found.weights.keys() == alone[task.name].weights.keys()
        for name, value in alone[task.name].ema.items():
            torch.testing.assert_close(found.ema[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_gradients_that_are_added_in_bfloat16_differ_by_its_rounding(
    alone: dict[str, Outcome], sharding: Any
) -> None:
    tasks = variants(sharding=sharding, reduce_dtype="bfloat16")[::3]
    for task, found in zip(tasks, start(*tasks, world_size=2), strict=True):
        expected = alone[task.name].gradients
        error = norm({name: found.gradients[name] - g for name, g in expected.items()})
        assert 1e-5 < error / norm(expected) < 1e-2  # 8 bits: 2^-9 of each number at most


def killed(task: Task, world_size: int) -> None:
    """Run until rank 0 is killed; the others then fail by themselves or are ended."""
    with pytest.raises(ProcessExitedException, match="signal SIGKILL"):
        start(task, world_size=world_size)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "sharding"), [(1, "ddp"), (2, "ddp"), (2, "fsdp2")])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    world_size: int, sharding: Any, tmp_path: Any
) -> None:
    compute = replace(ONE, sharding=sharding)
    tasks = [
        Task(name=n, folder=str(tmp_path / n), dropout=0.2, kill_at=5, compute=compute)
        for n in NAMES
    ]
    straight = start(*(replace(t, folder="", kill_at=-1) for t in tasks), world_size=world_size)
    for task in tasks:
        killed(task, world_size)
    resumed = start(*(replace(task, kill_at=-1) for task in tasks), world_size=world_size)
    for whole, late in zip(straight, resumed, strict=True):
        assert [step for step, _ in late.ids] == [3, 4, 5]  # from the checkpoint of step 3
        assert late.ids == whole.ids[3:]
        assert without_speed(late.history) == without_speed(whole.history)
        assert late.sha256() == whole.sha256()


def without_speed(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith("speed/")} for row in history]


@pytest.mark.slow
def test_one_run_on_one_then_two_then_one_rank_uses_the_same_global_batches(tmp_path: Any) -> None:
    steps = 12
    compute = replace(ONE, save_every_steps=4)
    tasks = [
        Task(name=n, folder=str(tmp_path / n), num_steps=steps, lr=1e-4, compute=compute)
        for n in ("finetune", "diffusion")
    ]
    alone = start(*(replace(task, folder="") for task in tasks))
    start(*(replace(task, stop_at=5) for task in tasks))
    sharded = replace(compute, sharding="fsdp2")
    middle = start(*(replace(task, stop_at=9, compute=sharded) for task in tasks), world_size=2)
    last = start(*tasks)
    for whole, second, third in zip(alone, middle, last, strict=True):
        assert second.ids == whole.ids[4:9]
        assert third.ids == whole.ids[8:]
        assert third.series("data/digest") == whole.series("data/digest")
        losses, expected = third.series("train/loss"), whole.series("train/loss")
        assert losses.keys() == expected.keys() == set(range(1, steps + 1))
        for step, loss in losses.items():
            assert math.isclose(loss, expected[step], rel_tol=1e-4), step


@pytest.mark.slow
def test_every_id_is_used_once_an_epoch_despite_three_kills(tmp_path: Any) -> None:
    num_epochs, per_epoch = 3, SAMPLES // BATCH
    steps = num_epochs * per_epoch
    compute = replace(ONE, save_every_steps=2)
    task = Task(name="diffusion", folder=str(tmp_path), num_steps=steps, compute=compute)
    for kill_at, world_size in ((3, 1), (5, 2), (8, 1)):
        killed(replace(task, kill_at=kill_at), world_size)
    (last,) = start(task)
    (alone,) = start(replace(task, folder=""))
    # The digest chains the ids of all committed steps, those before the kills included.
    assert last.series("data/digest") == alone.series("data/digest")
    committed = dict(alone.ids)
    assert committed.keys() == set(range(steps))
    assert dict(last.ids).items() <= committed.items()
    for epoch in range(num_epochs):
        ids = [i for s in range(per_epoch) for i in committed[epoch * per_epoch + s]]
        assert sorted(ids) == list(range(SAMPLES))
