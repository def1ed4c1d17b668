"""Optimiser, learning-rate schedule and gradient clipping, as plain functions of a small configuration.

The learning rate is a function of the step, not of a scheduler object: a resumed run needs no schedule state.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["OptimConfig", "build_optimizer", "clip_gradients", "learning_rate", "set_learning_rate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 1e-4
    """Peak learning rate. DRoRAE, section 2.2: 1e-4 in every phase."""
    betas: tuple[float, float] = (0.5, 0.9)
    """AdamW betas. DRoRAE tokenizer phases (.5,.9), DiT (.9,.999); RAE (.9,.95) in both."""
    weight_decay: float = 0.05
    """Decoupled weight decay. DRoRAE tokenizer phases 0.05, DiT 0; RAE 0."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Shape after the warm-up: constant, or from `lr` down to `final_lr`."""
    warmup_steps: int = 0
    """Linear rise from 0, factor (step + 1) / warmup_steps. RAE decoder: one epoch."""
    hold_steps: int = 0
    """Steps at `lr` before the decay starts. RAE DiT: 40 epochs."""
    final_lr: float = 0.0
    """Learning rate at the end of the schedule. RAE: 2e-5."""
    clip_norm: float = 0.0
    """Largest global gradient norm; 0 switches clipping off. RAE: off for the decoder, 1.0 for the DiT."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.lr <= 0:
            raise ValueError(f"optim.lr={self.lr} is out of range: expected a positive number.")
        if min(self.warmup_steps, self.hold_steps) < 0 or self.clip_norm < 0:
            raise ValueError("optim.warmup_steps, hold_steps and clip_norm must be 0 or more.")


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Learning rate of the update that follows `step` finished updates."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    start = config.warmup_steps + config.hold_steps
    if config.schedule == "constant" or step < start:
        return config.lr
    progress = min(1.0, (step - start) / max(1, num_steps - start))
    if config.schedule == "cosine":
        progress = 0.5 * (1.0 - math.cos(math.pi * progress))
    return config.lr + (config.final_lr - config.lr) * progress


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that require gradients."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Clip by global norm and return the norm before clipping; `max_norm` 0 only measures."""
    limit = max_norm if max_norm > 0 else float("inf")
    return nn.utils.clip_grad_norm_(list(parameters), limit, error_if_nonfinite=False)
