"""The state of a training loop in one dataclass, and what both loops do with it.

What a continuation needs is all here: weights, averages, optimiser moments, the discriminator with
its optimiser (`extra`), finished steps, counts of the guards, best metrics and the logged history.
What is a function of the step needs no state: which samples come next, noise, augmentation, both
learning rates, and whether the discriminator learns and guides. Draws from torch's global
generators (dropout of some fusions) are such a function too, because every part of every step
starts them anew from (seed, step, rank, part).
"""

import hashlib
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from drorae.training.ema import averaged, ema_init, ema_update
from drorae.training.guards import SPIKE_SCORE, FiniteGuard, spike_score
from drorae.training.jobs import OptimConfig
from drorae.training.loop import LoopTools, TrainReport
from drorae.training.meter import Meter
from drorae.training.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    set_learning_rate,
)
from drorae.training.parallel import gradient_sync, is_sharded, unwrapped
from drorae.training.saved import gather, put_back, whole_on_main
from drorae.training.world import World, mean_over_ranks

__all__ = [
    "Stateful",
    "TrainState",
    "apply_update",
    "begin",
    "evaluate_if_due",
    "finish",
    "log_step",
    "mean_terms",
    "save_if_due",
    "seed_part",
]

log = logging.getLogger(__name__)
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
    put_back(state, tools.checkpoints.latest() if world.is_main else None, world)
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
    grad_norm = clip_gradients(state.module.parameters(), state.optim.clip_norm)
    state.guard.arm(state.step, *losses, grad_norm)
    set_learning_rate(state.optimizer, learning_rate(state.optim, state.step, state.num_steps))
    state.optimizer.step()
    ema_update(state.ema, state.module, state.ema_decay)
    state.step += 1
    return grad_norm


def seed_part(seed: int, step: int, world: World, part: int) -> None:
    """Start torch's global generators for one part of this rank's share of a step."""
    digest = hashlib.sha256(f"{seed}/global/{step}/{world.rank}/{part}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def mean_terms(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Average of each term over the parts of a batch."""
    if len(rows) == 1:
        return dict(rows[0])
    return {name: torch.stack([row[name].detach() for row in rows]).mean() for name in rows[0]}


def log_step(
    state: TrainState,
    tools: LoopTools,
    terms: Mapping[str, Tensor],
    batch_images: int,
    job: object,
    ids_digest: int,
) -> None:
    """At a log point: one host sync, the finite check, and a row for tracker and history.

    Args:
        state: The loop's.
        tools: Where to log.
        terms: What to log, scalars.
        batch_images: Images of the step.
        job: For messages.
        ids_digest: Checksum of the global batch.

    Raises:
        RuntimeError: A loss or gradient since the last log point was not finite.
    """
    state.meter.count(batch_images)
    state.data_digest = zlib.crc32(ids_digest.to_bytes(4, "little"), state.data_digest)
    if state.step % tools.compute.log_every_steps and state.step != state.num_steps:
        return
    for guard in _guards(state):
        guard.check(state.name, job)
    overdue = tools.world.is_main and tools.checkpoints.overdue()
    asked = torch.full((), float(overdue), device=tools.world.device)
    stacked = torch.stack([*(term.detach().float() for term in terms.values()), asked])
    *values, asked_by_main = mean_over_ranks(stacked, tools.world).tolist()
    state.save_asked = state.save_asked or asked_by_main > 0
    row = dict(zip((f"train/{name}" for name in terms), values, strict=True))
    row |= {"train/lr": state.optimizer.param_groups[0]["lr"]} | state.meter.read()
    row |= {"data/digest": float(state.data_digest)} | _guard_row(state, tools, job)
    if tools.world.is_main:
        row |= _spike_row(state, row)
        state.history.append({"step": state.step, **row})
        tools.log(row, state.step)
        tools.progress(state.step * batch_images, state.num_steps * batch_images)


def _guards(state: TrainState) -> list[FiniteGuard]:
    return [state.guard, *([state.extra.guard] if state.extra is not None else [])]


def _spike_row(state: TrainState, row: Mapping[str, float]) -> dict[str, float]:
    """How unusual the loss is; warned of, never acted upon."""
    earlier = [r["train/loss"] for r in state.history[-200:] if "train/loss" in r]
    score = spike_score(earlier, row["train/loss"])
    if score > SPIKE_SCORE:
        log.warning(
            "%s: loss %.4g at step %d lies %.1f robust standard deviations above the last ones",
            state.name,
            row["train/loss"],
            state.step,
            score,
        )
    return {"train/loss_spike": score}


def _guard_row(state: TrainState, tools: LoopTools, job: object) -> dict[str, float]:
    """Counts of steps left out; goes back to the last checkpoint after too many in a row."""
    if tools.compute.on_non_finite == "stop":
        return {}
    counts = [guard.skipped() for guard in _guards(state)]
    if max(longest for _, _, longest in counts) >= tools.compute.rollback_after_skips:
        _roll_back(state, tools, job)
    return {"guard/skipped_steps": float(sum(total for total, _, _ in counts))}


def _roll_back(state: TrainState, tools: LoopTools, job: object) -> None:
    """Put weights, moments and averages back; the step, and so the data, goes on.

    Raises:
        RuntimeError: Nothing to go back to, or training was there before.
    """
    at, history, digest, best = state.step, state.history, state.data_digest, state.best
    counts = [guard.state_dict() for guard in _guards(state)]
    was_there = state.rolled_back_at
    found = put_back(
        state, tools.checkpoints.latest() if tools.world.is_main else None, tools.world
    )
    if not found or state.step <= was_there:
        raise RuntimeError(
            f"{state.name}: {tools.compute.rollback_after_skips} steps in a row up to step {at} "
            "had a loss or gradient that is not finite, and "
            + ("going back to the last checkpoint did not help. " if found else "no checkpoint. ")
            + "Lower optim.lr, set optim.clip_norm, or use precision=float32; then rerun the "
            f"stage. Configuration: {job!r}"
        )
    log.warning("%s: at step %d back to the weights of step %d", state.name, at, state.step)
    state.step, state.history, state.data_digest, state.best = at, history, digest, best
    state.rolled_back_at = at
    for guard, saved in zip(_guards(state), counts, strict=True):
        guard.load_state_dict(saved)
        guard.restart()


def evaluate_if_due(state: TrainState, tools: LoopTools, every_steps: int) -> None:
    """Run every evaluator on averaged and on online weights; one row for tracker and history."""
    if state.step % every_steps or not (tools.world.is_main or is_sharded(state.module)):
        return
    was_training = state.module.training
    state.wrapped.eval()
    row = _evaluate(state, tools, "eval_online")
    with averaged(state.ema, state.module):
        row |= _evaluate(state, tools, "eval")
    state.wrapped.train(was_training)
    if not row:
        return
    state.best |= {k: max(v, state.best.get(k, v)) for k, v in row.items()}
    row |= {f"best/{name}": value for name, value in state.best.items()}
    if tools.world.is_main:
        tools.log(row, state.step)
        state.history.append({"step": state.step, **row})


@torch.no_grad()
def _evaluate(state: TrainState, tools: LoopTools, prefix: str) -> dict[str, float]:
    row: dict[str, float] = {}
    for evaluator in tools.evaluators:
        row |= evaluator(state.step, prefix)
    return row


def save_if_due(state: TrainState, tools: LoopTools, job: object) -> None:
    """Write a checkpoint when one is due; never one of a bad step.

    Raises:
        RuntimeError: A loss or gradient since the last check was not finite.
    """
    if state.step >= state.num_steps:
        return
    if not (tools.checkpoints.due(state.step) or state.save_asked):
        return
    for guard in _guards(state):
        guard.check(state.name, job)
    if any(row for _, row, _ in (guard.skipped() for guard in _guards(state))):
        return  # the weights may be what makes the losses bad: keep the one before
    state.save_asked = False
    saved = gather(state, tools.world)
    if tools.world.is_main:
        tools.checkpoints.save(state.step, saved)


def finish(state: TrainState) -> TrainReport:
    """Whole weights, average and history (a collective where they are sharded)."""
    return TrainReport(
        ema=whole_on_main(state.ema, state.world),
        weights=whole_on_main(state.module.state_dict(), state.world),
        history=state.history,
    )
