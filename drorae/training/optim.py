"""Optimiser, learning-rate schedule and gradient clipping, as functions of a small configuration.

The learning rate is a function of the step, not of a scheduler object: a resumed run needs no
schedule state.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from drorae.training.jobs import OptimConfig
from drorae.training.parallel import total_norm

__all__ = ["build_optimizer", "clip_gradients", "learning_rate", "set_learning_rate"]


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Learning rate of the update that follows `step` finished updates."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    start = config.warmup_steps + config.hold_steps
    if config.schedule == "constant" or step < start:
        return config.lr
    end = config.schedule_steps or num_steps
    progress = min(1.0, (step - start) / max(1, end - start))
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
    """Clip by the global norm over all ranks and return the norm before clipping.

    `max_norm` 0 only measures.
    """
    trained = [p for p in parameters if p.grad is not None]
    norm = total_norm([p.grad for p in trained if p.grad is not None])
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return norm
