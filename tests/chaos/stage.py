"""The stage that is broken: the real diffusion stage, tiny, with its batches noted in a journal.

Everything but the pause and the note in front of each batch is the product: `pipelines.job`, the
lease and commit of the store, Ray Train, the loop, its checkpoints.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drorae.config import Compute
from drorae.data.batches import LatentBatch
from drorae.models.dit_config import DiTConfig
from drorae.store.context import StageContext, StageResult
from drorae.training.jobs import DiffusionStage
from drorae.training.world import World

CHANNELS, SIDE, CLASSES, SAMPLES, BATCH = 8, 2, 3, 64, 8
NUM_STEPS = 40
SAVE_EVERY_STEPS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Watching:
    """How the stage is observed."""

    journal_path: str
    """File that every rank appends its batches to."""
    step_s: float = 0.2
    """Pause before every batch, in seconds."""
    hang_path: str = ""
    """Rank 1 stands still for ever when this file exists, and removes it first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChaosJob:
    """Configuration of the stage, as a job reads it."""

    seed: int = 3
    """Seed of the run."""
    diffusion: DiffusionStage = field(
        default_factory=lambda: DiffusionStage(
            model=DiTConfig(
                input_size=SIDE,
                in_channels=CHANNELS,
                hidden_size=(16, 32),
                depth=(2, 1),
                num_heads=(2, 2),
                num_classes=CLASSES,
            ),
            num_steps=NUM_STEPS,
            batch_images=BATCH,
        )
    )
    """A diffusion stage that takes milliseconds a step."""
    watching: Watching
    """How it is observed."""
    compute: Compute
    """How it runs."""


def run(
    ctx: StageContext, *, seed: int, diffusion: DiffusionStage, watching: Watching
) -> StageResult:
    """Entry of the stage: what `drorae.training.stages.run_diffusion` does, observed."""
    from drorae.training.ray_worker import train_on_ray

    return train_on_ray(ctx, train, {"seed": seed, "job": diffusion, "watching": watching})


def train(
    ctx: StageContext, world: World, *, seed: int, job: DiffusionStage, watching: Watching
) -> StageResult:
    """Body of every worker: the product's, with another source of batches around its own."""
    from drorae.training import stages

    real = stages.latent_batches

    def observed(latents: Any, *, start_step: int, **order: Any) -> Iterator[LatentBatch]:
        journal = Journal(Path(watching.journal_path), world)
        journal.note("start", step=start_step)
        for batch in real(latents, start_step=start_step, **order):
            time.sleep(watching.step_s)
            journal.note("batch", step=batch.step, ids=batch.ids.tolist())
            _hang_if_asked(watching, world)
            yield batch

    stages.latent_batches = observed
    try:
        return stages._train_dit(ctx, world, seed=seed, job=job)
    finally:
        stages.latent_batches = real


def _hang_if_asked(watching: Watching, world: World) -> None:
    if watching.hang_path and world.rank == 1 and os.path.exists(watching.hang_path):
        os.unlink(watching.hang_path)
        time.sleep(3600)


class Journal:
    """Appends what a rank does; one write a line, so that lines of several ranks do not mix."""

    def __init__(self, path: Path, world: World) -> None:
        self._path = path
        self._who: dict[str, Any] = {
            "rank": world.rank,
            "world_size": world.world_size,
            "pid": os.getpid(),
        }
        placement = _placement_group()
        self._who["group"] = placement.id.hex() if placement else "alone"

    def note(self, event: str, **more: Any) -> None:
        """Append one line."""
        line = json.dumps({"event": event, "time": time.time(), **self._who, **more}) + "\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def _placement_group() -> Any:
    """That of the workers; none outside of Ray, which asking for it would start."""
    # Not at the top: Ray reads how to authenticate when it is imported, and the harness decides
    # that later.
    import ray
    from ray.util.placement_group import get_current_placement_group

    return get_current_placement_group() if ray.is_initialized() else None
