"""The state of a training loop in one dataclass, and the four things that both loops do with it.

What a continuation needs is all here: weights, averages, optimiser moments, the finished steps and
the logged history. Data order, noise and the learning rate are functions of the step, so they need
no state.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from drorae.training.ema import ema_init, ema_update
from drorae.training.guards import FiniteGuard
from drorae.training.jobs import OptimConfig
from drorae.training.loop import LoopTools
from drorae.training.meter import Meter
from drorae.training.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    set_learning_rate,
)
from drorae.training.world import mean_over_ranks

__all__ = ["Stateful", "TrainState", "apply_update", "begin", "log_step", "save_if_due"]


class Stateful(Protocol):
    """Further state that belongs in a checkpoint, such as the discriminator's."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that a continuation needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        ...


@dataclass(kw_only=True, slots=True)
class TrainState:
    """What changes while a loop runs."""

    name: str
    """Stage, for messages."""
    module: nn.Module
    """The trained module, without DDP wrapper."""
    optim: OptimConfig
    """Schedule and clipping."""
    num_steps: int
    """Where the loop ends."""
    ema_decay: float
    """Decay of the average per step."""
    optimizer: torch.optim.Optimizer
    """AdamW over the module."""
    guard: FiniteGuard
    """Skips updates after a non-finite loss."""
    ema: dict[str, Tensor]
    """Averaged parameters."""
    history: list[dict[str, float]]
    """Every logged row."""
    step: int = 0
    """Finished updates."""
    meter: Meter
    """Speed since the last log point."""
    extra: Stateful | None = None
    """Saved and restored along."""


def begin(
    name: str,
    module: nn.Module,
    tools: LoopTools,
    *,
    optim: OptimConfig,
    num_steps: int,
    ema_decay: float,
    extra: Stateful | None = None,
) -> TrainState:
    """State of a fresh loop, or of the newest checkpoint if there is one."""
    device = tools.world.device
    optimizer = build_optimizer(module, optim)
    state = TrainState(
        name=name,
        module=module,
        optim=optim,
        num_steps=num_steps,
        ema_decay=ema_decay,
        optimizer=optimizer,
        guard=FiniteGuard(optimizer, device),
        ema=ema_init(module),
        history=[],
        meter=Meter(),
        extra=extra,
    )
    saved = tools.checkpoints.latest()
    if saved is not None:
        state.step, state.history = saved["step"], saved["history"]
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        state.ema = {name: value.to(device) for name, value in saved["ema"].items()}
        if extra is not None:
            extra.load_state_dict(saved["extra"])
    return state


def apply_update(state: TrainState, loss: Tensor) -> Tensor:
    """Backward, clip, refuse a non-finite update, step, average.

    Returns the gradient norm before clipping.
    """
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    grad_norm = clip_gradients(state.module.parameters(), state.optim.clip_norm)
    state.guard.arm(state.step, loss, grad_norm)
    set_learning_rate(state.optimizer, learning_rate(state.optim, state.step, state.num_steps))
    state.optimizer.step()
    ema_update(state.ema, state.module, state.ema_decay)
    state.step += 1
    return grad_norm


def log_step(
    state: TrainState, tools: LoopTools, terms: Mapping[str, Tensor], batch_images: int, job: object
) -> None:
    """At a log point: one host sync, the finite check, and a row for tracker and history.

    Raises:
        RuntimeError: A loss or gradient since the last log point was not finite.
    """
    state.meter.count(batch_images)
    if state.step % tools.compute.log_every_steps and state.step != state.num_steps:
        return
    state.guard.check(state.name, job)
    stacked = torch.stack([term.detach().float() for term in terms.values()])
    values = mean_over_ranks(stacked, tools.world).tolist()
    row = dict(zip((f"train/{name}" for name in terms), values, strict=True))
    row |= {"train/lr": state.optimizer.param_groups[0]["lr"]} | state.meter.read()
    if tools.world.is_main:
        state.history.append({"step": state.step, **row})
        tools.log(row, state.step)
        tools.progress(state.step * batch_images, state.num_steps * batch_images)


def save_if_due(state: TrainState, tools: LoopTools, job: object) -> None:
    """Write a checkpoint when one is due; never one of a bad step.

    Raises:
        RuntimeError: A loss or gradient since the last check was not finite.
    """
    if state.step >= state.num_steps or not tools.checkpoints.due(state.step):
        return
    state.guard.check(state.name, job)
    if tools.world.is_main:
        saved = {"step": state.step, "history": state.history, "ema": state.ema}
        saved |= {"module": state.module.state_dict(), "optimizer": state.optimizer.state_dict()}
        saved |= {"extra": state.extra.state_dict()} if state.extra is not None else {}
        tools.checkpoints.save(state.step, saved)
