"""Loops on several ranks and in parts, in processes of their own."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from rank_fakes import Outcome, Task, start
from torch import Tensor

from drorae.config import Compute

NAMES = ("decoder", "fusion", "finetune", "diffusion")
ONE = Compute(log_every_steps=1, save_every_steps=3)
SHARDED = replace(ONE, sharding="fsdp2")


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
    for name in expected.history[-1].keys() & {"train/loss", "train/gan_weight", "train/grad_norm"}:
        for step, value in expected.series(name).items():
            # The weight is a ratio of two norms, each with rounding errors of its own.
            assert math.isclose(found.series(name)[step], value, rel_tol=5 * tolerance), name


def norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in tensors.values()))


def test_parts_of_a_batch_give_the_gradients_of_the_whole(alone: dict[str, Outcome]) -> None:
    for name, found in zip(NAMES, start(*variants(accumulate_steps=2)), strict=True):
        assert_alike(found, alone[name])


def test_two_ranks_with_and_without_shards_or_parts_give_the_gradients_of_one(
    alone: dict[str, Outcome],
) -> None:
    tasks = [
        *variants(),
        *variants(accumulate_steps=2),
        *variants(sharding="fsdp2"),
        *variants(sharding="fsdp2", accumulate_steps=4, activation_checkpointing=True),
    ]
    for task, found in zip(tasks, start(*tasks, world_size=2), strict=True):
        assert_alike(found, alone[task.name])
        assert found.weights.keys() == alone[task.name].weights.keys()
        for name, value in alone[task.name].ema.items():
            torch.testing.assert_close(found.ema[name], value, rtol=1e-3, atol=1e-4)
