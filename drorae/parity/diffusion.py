"""Checks of the diffusion transformer: velocity, loss, time grid and three samplers."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from drorae.diffusion.guidance import (
    autoguidance_velocity_fn,
    cfg_velocity_fn,
    conditional_velocity_fn,
)
from drorae.diffusion.interpolation import add_noise, velocity_loss
from drorae.diffusion.solvers import VelocityFn, euler
from drorae.diffusion.times import time_grid
from drorae.models.checkpoint_layout import check_tensors
from drorae.models.dit import DiT, DiTConfig
from drorae.models.reference_config import read_dit_config, unknown_dit_keys, without_keys
from drorae.models.weights_file import read_weights
from drorae.parity.folder import Check, Part
from drorae.shapes import Tensor

__all__ = ["DiffusionPart"]

SAMPLE_TOLERANCE = 2e-4  # several steps, guidance amplifies differences of two evaluations
SETTINGS = frozenset(
    {
        *("model", "weak_model", "num_grid_points", "time_shift"),
        *("guidance_scale", "guidance_interval"),
    }
)
WEIGHTS, WEAK_WEIGHTS = "dit_dh.safetensors", "dit_dh_weak.safetensors"


class DiffusionPart(Part):
    """Velocity, loss, time grid and samples of a diffusion transformer."""

    config_file = "dit_dh.json"
    io_file = "dit_dh_io.safetensors"

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The known keys of the configuration file."""
        self.passed_over |= dict.fromkeys(sorted(self.content.keys() - SETTINGS))
        return {name: self.content[name] for name in SETTINGS & self.content.keys()}

    @cached_property
    def model(self) -> DiT:
        """The network that is sampled from."""
        return self._load("model", WEIGHTS)

    @cached_property
    def weak_model(self) -> DiT:
        """The network that AutoGuidance pushes away from."""
        return self._load("weak_model", WEAK_WEIGHTS)

    def grid(self) -> Tensor:
        """Our sampling times for the folder's number of points and shift."""
        points = int(self._number("num_grid_points"))
        return time_grid(points, max(self._number("time_shift"), 1.0))  # RAE holds it at 1

    def velocity(self) -> Tensor:
        """One evaluation."""
        return self.model(self.read("x"), self.read("t"), self._labels("y"))

    def loss(self) -> Tensor:
        """Training loss without label dropout."""
        clean, noise, t = (self.read(f"loss_{name}") for name in ("clean", "noise", "t"))
        velocity = self.model(add_noise(clean, noise, t), t, self._labels("labels"))
        loss = velocity_loss(velocity, clean, noise).mean()
        return loss if self.io["loss"].ndim == 0 else loss[None]

    def sample_unguided(self) -> Tensor:
        """Euler without guidance."""
        return self._sample(conditional_velocity_fn(self.model, self._labels("labels")))

    def sample_cfg(self) -> Tensor:
        """Euler with classifier-free guidance."""
        labels, null = self._labels("labels"), self.model.null_label
        return self._sample(
            cfg_velocity_fn(self.model, labels, null_label=null, **self._guidance())
        )

    def sample_autoguidance(self) -> Tensor:
        """Euler with AutoGuidance."""
        labels, guidance = self._labels("labels"), self._guidance()
        return self._sample(
            autoguidance_velocity_fn(self.model, self.weak_model, labels, **guidance)
        )

    def _sample(self, velocity: VelocityFn) -> Tensor:
        # On the stored times where there are some: a wrong grid then fails its own check only.
        grid = self.io["time_grid"] if "time_grid" in self.io else self.grid()
        return euler(velocity, self.read("noise"), grid.float())

    def _labels(self, name: str) -> Tensor:
        labels, rows = self.read(name), self.model.config.num_label_rows
        if labels.numel() and not 0 <= labels.min() <= labels.max() < rows:
            raise ValueError(f"{self.io_file}: {name}={labels.tolist()}; expected 0 to {rows - 1}")
        return labels

    def _guidance(self) -> dict[str, Any]:
        interval = self.settings.get("guidance_interval", [0.0, 1.0])
        if not isinstance(interval, list) or len(interval) != 2:
            raise ValueError(f"{self.config_file}: guidance_interval={interval!r}; expected [a, b]")
        # In float32, as the reference compares: an end written 0.9 includes the time 0.9.
        ends = torch.tensor(
            [self._as_number("guidance_interval", end) for end in interval]
        ).tolist()
        low, high = max(ends[0], 0.0), min(ends[1], 1.0)
        scale = max(self._number("guidance_scale"), 0.0)
        if low > high:  # holds no time at all
            return {"scale": 1.0}
        return {"scale": scale, "interval": (low, high)}

    def _number(self, name: str) -> float:
        return self._as_number(name, self.settings.get(name))

    def _as_number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{self.config_file}: {name}={value!r}; expected a number")
        return float(value)

    def _load(self, section: str, weights: str) -> DiT:
        if section not in self.settings:
            raise ValueError(f"{self.config_file} lacks {section!r}: expected constructor fields")
        config = self._config(section)
        state = read_weights(self.path(weights)).tensors
        if not config.has_head:
            state = _without_sigma(state, config.in_channels, config.patches[0])
        with torch.device("meta"):  # sizes that do not fit may be beyond any memory
            expected = DiT(config).state_dict()
        check_tensors(state, expected, f"{weights} does not fit {section}")
        model = DiT(config).eval()
        model.load_state_dict(state, strict=True)
        return model

    def _config(self, section: str) -> DiTConfig:
        fields = self.settings[section]
        unknown = unknown_dit_keys(fields)
        self.passed_over |= dict.fromkeys(f"{section}.{key}" for key in unknown)
        known = without_keys(fields, unknown) if unknown else fields
        return read_dit_config(known, f"{self.config_file}: {section}")

    checks: Mapping[str, Check] = {
        "time_grid": Check(compute=grid),
        "velocity": Check(compute=velocity, inputs=("x", "t", "y"), files=(WEIGHTS,)),
        "loss": Check(
            compute=loss,
            inputs=("loss_clean", "loss_noise", "loss_t", "labels"),
            files=(WEIGHTS,),
        ),
        "sample_unguided": Check(
            compute=sample_unguided,
            inputs=("noise", "labels"),
            files=(WEIGHTS,),
            tolerance=SAMPLE_TOLERANCE,
        ),
        "sample_cfg": Check(
            compute=sample_cfg,
            inputs=("noise", "labels"),
            files=(WEIGHTS,),
            tolerance=SAMPLE_TOLERANCE,
        ),
        "sample_autoguidance": Check(
            compute=sample_autoguidance,
            inputs=("noise", "labels"),
            files=(WEIGHTS, WEAK_WEIGHTS),
            tolerance=SAMPLE_TOLERANCE,
        ),
    }


def _without_sigma(state: dict[str, Tensor], channels: int, patch: int) -> dict[str, Tensor]:
    """Drop the outputs that LightningDiT's learn_sigma adds: the second half of each position."""
    key = "final_layer.linear.{}"
    names = [key.format(kind) for kind in ("weight", "bias")]
    if any(name not in state or len(state[name]) != 2 * channels * patch**2 for name in names):
        return state
    halves = {
        name: state[name].unflatten(0, (patch**2, 2 * channels))[:, :channels].flatten(0, 1)
        for name in names
    }
    return {**state, **halves}
