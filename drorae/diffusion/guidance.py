"""Guided velocities: classifier-free, AutoGuidance, internal guidance.

All three push away from a weaker prediction: weak + scale * (strong - weak). One rule decides when:
the scale is above 1 and t lies in the interval, both ends included, on the shifted times that the
solver steps through (t = 1 is noise). Otherwise only the strong model runs, on the plain batch: a
scale of 1 or less is no guidance, never a weaker model, as in RAE.
Source: arXiv:2207.12598 (CFG), arXiv:2404.07724 (interval), arXiv:2406.02507 (AutoGuidance), RAEv2
(internal guidance).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from drorae.diffusion.solvers import VelocityFn
from drorae.shapes import Float, Int, Tensor

__all__ = [
    "GuidanceConfig",
    "VelocityModel",
    "autoguidance_velocity_fn",
    "cfg_velocity_fn",
    "check_eval",
    "conditional_velocity_fn",
    "guided_velocity_fn",
    "internal_guidance_velocity_fn",
    "is_guided",
]

VelocityModel = Callable[..., Any]
"""A network called as model(noisy, t, labels) with t a tensor of one time per sample; in eval mode
if it is a module."""

Interval = tuple[float, float]
FULL_INTERVAL: Interval = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class GuidanceConfig:
    """Kind and strength of guidance."""

    kind: Literal["none", "cfg", "autoguidance", "internal"] = "none"
    """What is pushed away from: nothing, the same model without class, a weaker model, the model's
    own base head."""
    scale: float = 1.0
    """1 is no guidance. RAE AutoGuidance: 1.42 at 256 px, 1.5 at 512 px; RAEv2 internal: 1.78;
    DRoRAE: 1.5."""
    t_min: float = 0.0
    """Lowest guided time, included, after the shift. RAEv2 internal: 0.1."""
    t_max: float = 1.0
    """Highest guided time, included, after the shift."""

    def __post_init__(self) -> None:
        """Check kind, scale and interval."""
        if self.kind not in ("none", "cfg", "autoguidance", "internal"):
            raise ValueError(
                f"kind={self.kind!r} is unknown: expected none, cfg, autoguidance or internal."
            )
        _check(self.scale, (self.t_min, self.t_max))


def is_guided(t: float, scale: float, interval: Interval) -> bool:
    """Whether guidance applies at time t: scale above 1 and t in the closed interval."""
    return scale > 1 and interval[0] <= t <= interval[1]


def conditional_velocity_fn(model: VelocityModel, labels: Int[Tensor, " batch"]) -> VelocityFn:
    """Velocity of the model for the given classes, without guidance.

    Raises:
        RuntimeError: If the model is in training mode, where it would drop labels.
    """
    check_eval(model)

    def velocity(noisy: Tensor, t: float) -> Tensor:
        return model(noisy, _times(noisy, t), labels)

    return velocity


def cfg_velocity_fn(
    model: VelocityModel,
    labels: Int[Tensor, " batch"],
    *,
    null_label: int,
    scale: float,
    interval: Interval = FULL_INTERVAL,
) -> VelocityFn:
    """Classifier-free guidance: null + scale * (conditional - null), on all channels.

    Both predictions share one double batch, and only where guidance applies.

    Args:
        model: Network trained with label dropout.
        labels: Class of each sample.
        null_label: Label of no class (`DiT.null_label`).
        scale: Strength; at most 1 is the plain conditional velocity.
        interval: Closed range of guided times, after the shift.

    Raises:
        ValueError: If scale or interval is out of range.
        RuntimeError: If the model is in training mode.
    """
    _check(scale, interval)
    plain = conditional_velocity_fn(model, labels)
    both_labels = torch.cat([labels, torch.full_like(labels, null_label)])

    def velocity(noisy: Tensor, t: float) -> Tensor:
        if not is_guided(t, scale, interval):
            return plain(noisy, t)
        both = torch.cat([noisy, noisy])
        strong, weak = model(both, _times(both, t), both_labels).chunk(2)
        return _push(weak, strong, scale)

    return velocity


def autoguidance_velocity_fn(
    model: VelocityModel,
    weak_model: VelocityModel,
    labels: Int[Tensor, " batch"],
    *,
    scale: float,
    interval: Interval = FULL_INTERVAL,
) -> VelocityFn:
    """AutoGuidance: weak + scale * (strong - weak), both for the same classes.

    Args:
        model: The strong network.
        weak_model: A smaller, less trained network on the same latents. It runs only where guidance
            applies.
        labels: Class of each sample.
        scale: Strength; at most 1 is the strong model alone.
        interval: Closed range of guided times, after the shift.

    Raises:
        ValueError: If scale or interval is out of range.
        RuntimeError: If a model is in training mode.
    """
    _check(scale, interval)
    strong_fn = conditional_velocity_fn(model, labels)
    weak_fn = conditional_velocity_fn(weak_model, labels)

    def velocity(noisy: Tensor, t: float) -> Tensor:
        strong = strong_fn(noisy, t)
        if not is_guided(t, scale, interval):
            return strong
        return _push(weak_fn(noisy, t), strong, scale)

    return velocity


def internal_guidance_velocity_fn(
    model: VelocityModel,
    labels: Int[Tensor, " batch"],
    *,
    scale: float,
    interval: Interval = FULL_INTERVAL,
) -> VelocityFn:
    """Internal guidance: base + scale * (full - base), both from one evaluation.

    Args:
        model: Network that, called with `with_base=True`, returns (velocity, base velocity).
        labels: Class of each sample.
        scale: Strength; at most 1 is the full prediction alone.
        interval: Closed range of guided times, after the shift. RAEv2: [0.1, 1].

    Raises:
        ValueError: If scale or interval is out of range.
        RuntimeError: If the model is in training mode.
    """
    _check(scale, interval)
    plain = conditional_velocity_fn(model, labels)

    def velocity(noisy: Tensor, t: float) -> Tensor:
        if not is_guided(t, scale, interval):
            return plain(noisy, t)
        full, base = model(noisy, _times(noisy, t), labels, with_base=True)
        return _push(base, full, scale)

    return velocity


def guided_velocity_fn(
    config: GuidanceConfig,
    model: VelocityModel,
    labels: Int[Tensor, " batch"],
    *,
    null_label: int | None = None,
    weak_model: VelocityModel | None = None,
) -> VelocityFn:
    """The velocity that a configuration asks for.

    Args:
        config: Kind, scale and interval.
        model: The network.
        labels: Class of each sample.
        null_label: Needed for `cfg`.
        weak_model: Needed for `autoguidance`.

    Raises:
        ValueError: If what the kind needs is not given.
        RuntimeError: If a model is in training mode.
    """
    interval = (config.t_min, config.t_max)
    if config.kind == "cfg":
        if null_label is None:
            raise ValueError("guidance.kind='cfg' needs null_label: pass DiT.null_label.")
        return cfg_velocity_fn(
            model, labels, null_label=null_label, scale=config.scale, interval=interval
        )
    if config.kind == "autoguidance":
        if weak_model is None:
            raise ValueError(
                "guidance.kind='autoguidance' needs weak_model: pass the network of the guide "
                "stage."
            )
        return autoguidance_velocity_fn(
            model, weak_model, labels, scale=config.scale, interval=interval
        )
    if config.kind == "internal":
        return internal_guidance_velocity_fn(model, labels, scale=config.scale, interval=interval)
    return conditional_velocity_fn(model, labels)


def _push(weak: Float[Tensor, "..."], strong: Float[Tensor, "..."], scale: float) -> Tensor:
    return weak + scale * (strong - weak)


def _times(noisy: Tensor, t: float) -> Tensor:
    # At least float32: bfloat16 cannot tell apart the first steps of a shifted grid (1, .9970,
    # .9939).
    dtype = torch.promote_types(noisy.dtype, torch.float32)
    return torch.full((noisy.shape[0],), t, dtype=dtype, device=noisy.device)


def _check(scale: float, interval: Interval) -> None:
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(
            f"guidance scale={scale} is out of range: expected a finite number of 0 or more."
        )
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(
            f"guidance interval={interval} is empty or out of range: expected 0 <= t_min <= t_max "
            "<= 1 "
            "on the shifted time, where 1 is noise."
        )


def check_eval(model: VelocityModel) -> None:
    """Refuse a network in training mode.

    Raises:
        RuntimeError: It would drop labels while sampling.
    """
    if isinstance(model, nn.Module) and model.training:
        raise RuntimeError(
            "The network is in training mode and would drop labels while sampling: expected eval "
            "mode; call model.eval()."
        )
