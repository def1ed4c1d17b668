"""DiT-DH, the sampler and the loss against tensors of the RAE reference (float32, CPU)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drorae.config import from_json
from drorae.diffusion.guidance import (
    autoguidance_velocity_fn,
    cfg_velocity_fn,
    conditional_velocity_fn,
)
from drorae.diffusion.interpolation import add_noise, velocity_loss
from drorae.diffusion.solvers import euler
from drorae.diffusion.times import time_grid
from drorae.models.dit import DiT, DiTConfig

GOLDEN = Path(__file__).parents[2] / "golden"
FORWARD_ATOL = 2e-5  # one evaluation; float32 sums in another order
SAMPLE_ATOL = 2e-4  # seven steps, differences of two networks times 1.5


def load_model(name, weights):
    config = from_json(DiTConfig, json.loads((GOLDEN / "dit_dh.json").read_text())[name])
    model = DiT(config)
    model.load_state_dict(load_file(GOLDEN / weights), strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def meta():
    return json.loads((GOLDEN / "dit_dh.json").read_text())


@pytest.fixture(scope="module")
def io():
    return load_file(GOLDEN / "dit_dh_io.safetensors")


@pytest.fixture(scope="module")
def model():
    return load_model("model", "dit_dh.safetensors")


@pytest.fixture(scope="module")
def weak_model():
    return load_model("weak_model", "dit_dh_weak.safetensors")


@pytest.fixture(scope="module")
def grid(meta):
    return time_grid(meta["num_grid_points"], meta["time_shift"])


def assert_close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def test_velocity(model, io):
    with torch.no_grad():
        velocity = model(io["x"], io["t"], io["y"])
    assert_close(velocity, io["velocity"], FORWARD_ATOL)


def test_fresh_tables_equal_the_stored_ones(model):
    stored = load_file(GOLDEN / "dit_dh.safetensors")
    fresh = DiT(model.config).state_dict()
    for key in fresh:
        if "freqs" in key or key == "pos_embed":
            assert_close(fresh[key], stored[key], 2e-6)


def test_time_grid(grid, io):
    assert_close(grid.float(), io["time_grid"], 1e-6)


def test_unguided_sample(model, grid, io):
    sample = euler(conditional_velocity_fn(model, io["labels"]), io["noise"], grid)
    assert_close(sample, io["sample_unguided"], SAMPLE_ATOL)


def test_cfg_sample(model, grid, io, meta):
    velocity = cfg_velocity_fn(
        model,
        io["labels"],
        null_label=model.null_label,
        scale=meta["guidance_scale"],
        interval=tuple(meta["guidance_interval"]),
    )
    assert_close(euler(velocity, io["noise"], grid), io["sample_cfg"], SAMPLE_ATOL)


def test_autoguidance_sample(model, weak_model, grid, io, meta):
    velocity = autoguidance_velocity_fn(
        model,
        weak_model,
        io["labels"],
        scale=meta["guidance_scale"],
        interval=tuple(meta["guidance_interval"]),
    )
    assert_close(euler(velocity, io["noise"], grid), io["sample_autoguidance"], SAMPLE_ATOL)


def test_loss(model, io):
    clean, noise, t = io["loss_clean"], io["loss_noise"], io["loss_t"]
    with torch.no_grad():
        velocity = model(add_noise(clean, noise, t), t, io["labels"])
    loss = velocity_loss(velocity, clean, noise).mean()
    assert_close(loss, io["loss"].squeeze(), FORWARD_ATOL)
