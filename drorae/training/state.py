"""The state of a training loop in one dataclass: its start, its update, its end.

What a continuation needs is all here: weights, averages, optimiser moments, the discriminator with
its optimiser (`extra`), finished steps, counts of the guards, best metrics and the logged history.
What is a function of the step needs no state: which samples come next, noise, augmentation, both
learning rates, and whether the discriminator learns and guides. Draws from torch's global
generators (dropout of some fusions) are such a function too, because every part of every step
starts them anew from (seed, step, rank, part). Logging, evaluating and saving are in `intervals`.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from drorae.training.ema import ema_init, ema_update, trained_parameters
from drorae.training.guards import FiniteGuard
from drorae.training.jobs import OptimConfig
from drorae.training.loop import LoopTools, TrainReport
from drorae.training.meter import Meter
from drorae.training.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    set_learning_rate,
)
from drorae.training.parallel import gradient_sync, unwrapped, whole_on_main
from drorae.training.saved import put_back
from drorae.training.world import World

__all__ = [
    "Stateful",
    "TrainState",
    "apply_update",
    "begin",
    "finish",
    "seed_part",
]

Part = TypeVar("Part")


class Stateful(Protocol):
    """Further state that belongs in a checkpoint, such as the discriminator's."""

    guard: FiniteGuard

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
    wrapped: nn.Module
    """The trained module as `parallel.distribute` gave it."""
    module: nn.Module
    """The same without DDP wrapper."""
    trained: dict[str, nn.Parameter]
    """Its parameters that are trained: looked up once, not in every step."""
    optim: OptimConfig
    """Schedule and clipping."""
    num_steps: int
    """Where the loop ends."""
    ema_decay: float
    """Decay of the average per step."""
    seed: int
    """Seed of the run."""
    world: World
    """Rank and device."""
    optimizer: torch.optim.Optimizer
    """AdamW over the module."""
    guard: FiniteGuard
    """Leaves out updates with a non-finite loss or gradient."""
    ema: dict[str, Tensor]
    """Averaged parameters, sharded as the parameters are."""
    history: list[dict[str, float]]
    """Every logged row."""
    step: int = 0
    """Finished updates, and with that the place in the order of samples."""
    best: dict[str, float] = field(default_factory=dict)
    """Largest value so far of each evaluated metric."""
    data_digest: int = 0
    """Checksum of the ids of all samples used so far, in order: the same for any number of ranks,
    with or without interruptions."""
    rolled_back_at: int = -1
    """Step at which the weights were last put back to a checkpoint."""
    meter: Meter
    """Speed since the last log point."""
    extra: Stateful | None = None
    """Saved and restored along."""
    save_asked: bool = False
    """Whether the time for a checkpoint has come; decided at log points for all ranks."""


def begin(
    name: str,
    wrapped: nn.Module,
    tools: LoopTools,
    *,
    optim: OptimConfig,
    num_steps: int,
    ema_decay: float,
    seed: int,
    extra: Stateful | None = None,
) -> TrainState:
    """State of a fresh loop, or of the newest checkpoint if there is one."""
    module, world = unwrapped(wrapped), tools.world
    optimizer = build_optimizer(module, optim)
    state = TrainState(
        name=name,
        wrapped=wrapped,
        module=module,
        trained=trained_parameters(module),
        optim=optim,
        num_steps=num_steps,
        ema_decay=ema_decay,
        seed=seed,
        world=world,
        optimizer=optimizer,
        guard=FiniteGuard(optimizer, world.device, policy=tools.compute.on_non_finite, world=world),
        ema=ema_init(module),
        history=[],
        meter=Meter(),
        extra=extra,
    )
    put_back(state, tools.checkpoints)
    if state.history and world.is_main:
        tools.catch_up(tuple(state.history))
    return state


def apply_update(
    state: TrainState, parts: Sequence[Part], loss_of: Callable[[Part], Tensor]
) -> Tensor:
    """Backward, clip, refuse a non-finite update, step, average.

    Args:
        state: Changed in place.
        parts: Parts of this rank's batch, of one size; gradients are averaged over them.
        loss_of: Forward pass of a part, to its mean loss.

    Returns:
        The gradient norm before clipping.
    """
    state.optimizer.zero_grad(set_to_none=True)
    losses = []
    for index, part in enumerate(parts):
        with gradient_sync(state.wrapped, index == len(parts) - 1):
            seed_part(state.seed, state.step, state.world, index)
            loss = loss_of(part)
            (loss / len(parts)).backward()
        losses.append(loss.detach())
    grad_norm = clip_gradients(state.trained.values(), state.optim.clip_norm)
    state.guard.arm(state.step, *losses, grad_norm)
    set_learning_rate(state.optimizer, learning_rate(state.optim, state.step, state.num_steps))
    state.optimizer.step()
    ema_update(state.ema, state.trained, state.ema_decay)
    state.step += 1
    return grad_norm


def seed_part(seed: int, step: int, world: World, part: int) -> None:
    """Start the global generators of CPU and device for one part of this rank's share of a step.

    `torch.manual_seed` would ask every kind of device that torch knows: half a millisecond a step,
    measured 2026-11-24 on two cores of an AMD EPYC.
    """
    digest = hashlib.sha256(f"{seed}/global/{step}/{world.rank}/{part}".encode()).digest()
    number = int.from_bytes(digest[:8], "little", signed=True)
    torch.default_generator.manual_seed(number)
    if world.device.type == "cuda":
        torch.cuda.manual_seed(number)


def finish(state: TrainState) -> TrainReport:
    """Whole weights, average and history (a collective where they are sharded)."""
    return TrainReport(
        ema=whole_on_main(state.ema, state.world),
        weights=whole_on_main(state.module.state_dict(), state.world),
        history=state.history,
    )
