"""Exponential moving average of the trained parameters, kept beside the module as a plain dict.

Of a sharded module it is sharded alike: each rank averages its own shard.

Only parameters that require gradients are averaged: multiplying frozen tensors (position tables,
Fourier weights) by decay and adding them back lets them drift by rounding, a defect of the
reference implementation.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from drorae.training.parallel import local

__all__ = ["averaged", "ema_init", "ema_state_dict", "ema_update", "trained_parameters"]


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Those that require gradients, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def ema_init(module: nn.Module) -> dict[str, Tensor]:
    """Start the average at the current parameters (float32 copies)."""
    return {name: p.detach().float().clone() for name, p in trained_parameters(module).items()}


@torch.no_grad()
def ema_update(average: dict[str, Tensor], parameters: Mapping[str, Tensor], decay: float) -> None:
    """Average <- decay * average + (1 - decay) * parameter, in place, one fused call."""
    current = [local(parameters[name]).float() for name in average]
    averages = [local(value) for value in average.values()]
    # torch 2.15 has no public name for the fused form.
    torch._foreach_lerp_(averages, current, 1.0 - decay)  # pyright: ignore[reportPrivateImportUsage]


def ema_state_dict(average: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A module's state dict with the trained parameters replaced by their averages."""
    return state | {name: value.to(state[name]) for name, value in average.items()}


@contextmanager
def averaged(average: dict[str, Tensor], module: nn.Module) -> Iterator[nn.Module]:
    """Run the same module with averaged parameters, then put the online ones back.

    Swapping values inside the same parameters keeps compiled graphs and DDP wrappers valid, so
    what is evaluated as "EMA" is the EMA.
    """
    parameters = trained_parameters(module)
    online = {name: parameters[name].detach().clone() for name in average}
    try:
        _copy_into(parameters, average)
        yield module
    finally:
        _copy_into(parameters, online)


@torch.no_grad()
def _copy_into(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        local(parameters[name]).copy_(local(value))
