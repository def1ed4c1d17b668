"""What a loop does every so many steps: log, look at the guards, evaluate, save.

A log point is the only place where the host waits for the device. All that ranks must agree on is
decided there: whether the time for a checkpoint has come, and whether too many steps in a row were
left out.
"""

import logging
import math
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from drorae.training.ema import averaged
from drorae.training.guards import SPIKE_SCORE, SPIKE_WINDOW, FiniteGuard, spike_score
from drorae.training.loop import LoopTools
from drorae.training.saved import gather, put_back
from drorae.training.state import TrainState
from drorae.training.watchdog import unhurried
from drorae.training.world import mean_over_ranks

__all__ = ["evaluate_if_due", "log_step", "mean_terms", "save_if_due"]

log = logging.getLogger(__name__)


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
    with state.meter.waiting_for_device():
        for guard in _guards(state):
            guard.check(state.name, job)
    overdue = tools.world.is_main and tools.checkpoints.overdue()
    asked = torch.full((), float(overdue), device=tools.world.device)
    stacked = torch.stack([*(term.detach().float() for term in terms.values()), asked])
    averaged_terms = mean_over_ranks(stacked, tools.world)
    with state.meter.waiting_for_device():
        *values, asked_by_main = averaged_terms.tolist()
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
    earlier = [r["train/loss"] for r in state.history[-4 * SPIKE_WINDOW :] if "train/loss" in r]
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
        with unhurried("going back to a checkpoint"):
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
    """Run every evaluator on averaged and on online weights; one row for tracker and history.

    On all ranks at once (a collective): each works on its share, so none waits for another longer
    than their shares differ.
    """
    if state.step % every_steps:
        return
    was_training = state.module.training
    state.wrapped.eval()
    with unhurried("evaluation"):
        row = _evaluate(state, tools, "eval_online")
        with averaged(state.ema, state.module):
            row |= _evaluate(state, tools, "eval")
    state.wrapped.train(was_training)
    if not row:
        return
    finite = {k: v for k, v in row.items() if math.isfinite(v)}
    state.best |= {k: max(v, state.best.get(k, v)) for k, v in finite.items()}
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
    with unhurried("checkpoint"):
        saved = gather(state, tools.world)
        if tools.world.is_main:
            tools.checkpoints.save(state.step, saved)
