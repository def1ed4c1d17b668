import math
import time
from typing import Any, Literal, get_args

import pytest
import torch
from torch import nn

from drorae.training.ema import (
    averaged,
    ema_init,
    ema_state_dict,
    ema_update,
    trained_parameters,
)
from drorae.training.guards import FiniteGuard
from drorae.training.jobs import OptimConfig
from drorae.training.meter import Meter
from drorae.training.optim import build_optimizer, clip_gradients, learning_rate
from drorae.training.world import World

Schedule = Literal["constant", "cosine", "linear"]


def test_cosine_schedule_starts_at_peak_and_ends_at_final() -> None:
    config = OptimConfig(lr=1.0, final_lr=0.1, schedule="cosine")
    assert learning_rate(config, 0, 100) == 1.0
    assert math.isclose(learning_rate(config, 50, 100), 0.55)
    assert math.isclose(learning_rate(config, 100, 100), 0.1)


def test_warmup_rises_linearly_from_the_first_step() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(config, s, 100) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_linear_schedule_holds_before_it_decays() -> None:
    config = OptimConfig(lr=1.0, final_lr=0.0, schedule="linear", hold_steps=50)
    assert learning_rate(config, 49, 100) == 1.0
    assert math.isclose(learning_rate(config, 75, 100), 0.5)


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_learning_rate_stays_between_its_ends(schedule: Schedule) -> None:
    config = OptimConfig(lr=1.0, final_lr=0.1, schedule=schedule, hold_steps=10)
    for step in range(501):
        assert 0.1 - 1e-12 <= learning_rate(config, step, 300) <= 1.0


def test_clip_measures_the_norm_before_clipping() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert float(clip_gradients(layer.parameters(), 1.0)) == 5.0
    assert math.isclose(float(layer.weight.grad.norm()), 1.0, rel_tol=1e-5)


def test_a_norm_limit_of_zero_leaves_gradients_alone() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    clip_gradients(layer.parameters(), 0.0)
    assert layer.weight.grad.tolist() == [[3.0, 4.0]]


@pytest.mark.parametrize("fields", [{"lr": 0.0}, {"warmup_steps": -1}, {"clip_norm": -1.0}])
def test_impossible_optimisers_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="optim"):
        OptimConfig(**fields)


def test_ema_is_the_weighted_history_of_the_trained_parameters() -> None:
    layer = nn.Linear(1, 1)
    layer.bias.requires_grad_(False)
    nn.init.constant_(layer.weight, 0.0)
    average = ema_init(layer)
    for value in (1.0, 2.0):
        nn.init.constant_(layer.weight, value)
        ema_update(average, trained_parameters(layer), 0.5)
    assert list(average) == ["weight"]
    assert float(average["weight"]) == 1.25


def test_averaged_swaps_the_weights_and_puts_them_back() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    average = {"weight": torch.full((1, 1), 3.0)}
    with averaged(average, layer) as module:
        assert module(torch.ones(1, 1)).item() == 3.0
    assert layer(torch.ones(1, 1)).item() == 1.0
    assert float(ema_state_dict(average, layer.state_dict())["weight"]) == 3.0


def test_averaged_puts_the_weights_back_after_an_error() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    with pytest.raises(KeyError), averaged({"weight": torch.zeros(1, 1)}, layer):
        raise KeyError
    assert layer.weight.item() == 1.0


def test_a_bad_step_changes_no_weight_and_is_named() -> None:
    layer = nn.Linear(2, 1)
    optimizer = build_optimizer(layer, OptimConfig(lr=0.1))
    guard = FiniteGuard(optimizer, torch.device("cpu"))
    moved = []
    for step, loss in enumerate([1.0, float("nan"), 1.0]):
        before = layer.weight.detach().clone()
        layer.zero_grad()
        layer(torch.ones(3, 2)).sum().backward()
        guard.arm(step, torch.tensor(loss), torch.tensor(1.0))
        optimizer.step()
        moved.append(not torch.equal(before, layer.weight))
    assert moved == [True, False, False]
    with pytest.raises(RuntimeError, match=r"fusion: .*not finite at step 1"):
        guard.check("fusion", OptimConfig())


def test_a_good_run_passes_the_guard() -> None:
    layer = nn.Linear(2, 1)
    guard = FiniteGuard(build_optimizer(layer, OptimConfig()), torch.device("cpu"))
    guard.arm(0, torch.tensor(1.0))
    guard.check("fusion", OptimConfig())


def test_local_batch_names_sizes_that_divide() -> None:
    assert World(rank=1, world_size=4).local_batch(32, "batch_images") == 8
    with pytest.raises(ValueError, match=r"batch_images=30 .* 4 workers; use 28 or 32"):
        World(rank=0, world_size=4).local_batch(30, "batch_images")
    with pytest.raises(ValueError, match="rank=4"):
        World(rank=4, world_size=4)


def test_meter_divides_the_time_into_data_device_and_host() -> None:
    meter = Meter()
    assert list(meter.timed([1, 2, 3])) == [1, 2, 3]
    meter.count(64)
    with meter.waiting_for_device():
        time.sleep(0.05)
    row = meter.read()
    assert row["speed/images_per_s"] > 0
    assert row["speed/peak_memory_bytes"] > 1e6
    assert 0 <= row["speed/data_wait_share"] + row["speed/host_share"] < 0.9
    assert meter.read()["speed/images_per_s"] == 0


def test_slow_batches_are_waiting_for_data_and_slow_steps_work_of_the_host() -> None:
    meter = Meter()
    for delay_s in meter.timed(time.sleep(d) or d for d in (0.05, 0.05)):
        assert delay_s
    slow_data = meter.read()
    for _ in meter.timed([1, 2]):
        time.sleep(0.05)
    slow_host = meter.read()
    assert slow_data["speed/data_wait_share"] > 0.5 > slow_data["speed/host_share"]
    assert slow_host["speed/host_share"] > 0.5 > slow_host["speed/data_wait_share"]
