"""Reading the journal of a run: who ran when, which steps counted, which were done twice.

A group of workers starts at the step of its checkpoint, and what an earlier group did from there on
is undone by that. So a step counts as the last group did it that started at or before it.
"""

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from drorae.data.order import epoch_ids, position, steps_per_epoch
from tests.chaos.stage import BATCH, SAMPLES

POLL_S = 0.05


@dataclass(kw_only=True, slots=True)
class Group:
    """One group of workers."""

    name: str
    """Address of its meeting point."""
    world_size: int
    """Number of ranks."""
    start_step: int
    """Step at which its checkpoint let it begin."""
    pids: dict[int, int] = field(default_factory=dict)
    """Process of every rank."""
    ids: dict[int, dict[int, list[int]]] = field(default_factory=dict)
    """Sample ids by step and rank."""
    times: dict[int, float] = field(default_factory=dict)
    """When rank 0 took the batch of a step."""

    @property
    def next_step(self) -> int:
        """Step after the last one that a rank began."""
        return max(self.ids, default=self.start_step - 1) + 1


def read_groups(path: Path) -> list[Group]:
    """The groups of workers so far, in order."""
    groups: dict[str, Group] = {}
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        entry = json.loads(line)
        name, rank, step = entry["group"], entry["rank"], entry["step"]
        group = groups.setdefault(
            name, Group(name=name, world_size=entry["world_size"], start_step=step)
        )
        group.pids[rank] = entry["pid"]
        if entry["event"] == "batch":
            group.ids.setdefault(step, {})[rank] = entry["ids"]
            if rank == 0:
                group.times[step] = entry["time"]
    return list(groups.values())


def wait_until(
    what: str, test: Callable[[], bool], timeout_s: float, every_s: float = 0.05
) -> float:
    """Seconds until the test was true.

    Raises:
        TimeoutError: It was not in time.
    """
    started_s = time.monotonic()
    while not test():
        if time.monotonic() - started_s > timeout_s:
            raise TimeoutError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(POLL_S)
    return time.monotonic() - started_s


def steps_redone(groups: list[Group]) -> list[int]:
    """For every restart, the steps that were begun before it and done again after it."""
    return [
        max(0, before.next_step - after.start_step) for before, after in itertools.pairwise(groups)
    ]


def counted(groups: list[Group], num_steps: int) -> dict[int, list[int]]:
    """Ids of every step that counts, in the order of the global batch.

    Raises:
        AssertionError: A step that no complete group did.
    """
    found: dict[int, list[int]] = {}
    for step in range(num_steps):
        group = [g for g in groups if g.start_step <= step][-1]
        by_rank = group.ids.get(step, {})
        assert sorted(by_rank) == list(range(group.world_size)), f"step {step}: ranks {by_rank}"
        found[step] = [number for rank in sorted(by_rank) for number in by_rank[rank]]
    return found


def order_errors(groups: list[Group], num_steps: int, seed: int) -> list[str]:
    """What is wrong with the samples that counted: each once an epoch, in the seed's order."""
    per_epoch = steps_per_epoch(SAMPLES, BATCH)
    steps = counted(groups, num_steps)
    errors: list[str] = []
    for epoch in range(num_steps // per_epoch):
        first = epoch * per_epoch
        ids = [number for step in range(first, first + per_epoch) for number in steps[step]]
        if sorted(ids) != list(range(SAMPLES)):
            errors.append(f"epoch {epoch}: {len(ids)} samples, {len(set(ids))} different ones")
    for step, ids in steps.items():
        epoch, inner = position(step, SAMPLES, BATCH)
        if ids != epoch_ids(seed, epoch, (SAMPLES,), BATCH, 1, 0)[inner].tolist():
            errors.append(f"step {step}: another batch than that of the seed")
    return errors
