"""The product side of a scenario: a workspace with latents, the job of the stage, its attempts.

Jobs are started by the launcher of `drorae run` and repeated as its flow does, without Prefect.
"""

import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from drorae.config import Compute, to_json
from drorae.data.shard_format import part_name, write_index, write_latent_shard
from drorae.store.context import StageContext, StageResult
from drorae.store.stage_run import run_once
from drorae.store.workspace import Workspace
from drorae.training.world import World
from pipelines.attempt import JobSpec
from pipelines.launch import LocalLauncher, StageFailed
from tests.chaos.journal import Group, read_groups
from tests.chaos.stage import (
    CHANNELS,
    CLASSES,
    NUM_STEPS,
    SAMPLES,
    SAVE_EVERY_STEPS,
    SIDE,
    ChaosJob,
    Watching,
    train,
)

KEY = "chaos0000000"
ATTEMPTS = 3
COMPUTE = Compute(
    num_workers=2,
    threads_per_worker=1,
    log_every_steps=1,
    save_every_steps=SAVE_EVERY_STEPS,
    hang_timeout_s=40.0,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What an undisturbed and a disturbed run are compared by."""

    weights: dict[str, str]
    """Sha256 of the averaged and the online weights, by file."""
    losses: list[float]
    """Loss of every step, as the training log has it."""


@dataclass(kw_only=True, slots=True)
class Run:
    """One run of the stage to its end, in a thread."""

    folder: Path
    """Local folder of this run: journal, logs."""
    workspace: str
    """Where its outputs go."""
    compute: Compute = COMPUTE
    """How it runs."""
    num_steps: int = NUM_STEPS
    """Length."""
    tracking_uri: str | None = None
    """MLflow address, or none."""
    hang_path: str = ""
    """See `Watching`."""
    errors: list[str] = field(default_factory=list)
    """Why attempts failed."""
    attempts: int = 0
    """Attempts so far."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _failure: BaseException | None = None

    @property
    def journal_path(self) -> Path:
        """The journal."""
        return self.folder / "journal.jsonl"

    def groups(self) -> list[Group]:
        """Groups of workers so far."""
        return read_groups(self.journal_path)

    def spec(self) -> JobSpec:
        """The job."""
        watching = Watching(journal_path=str(self.journal_path), hang_path=self.hang_path)
        job = ChaosJob(watching=watching, compute=self.compute)
        job = replace(job, diffusion=replace(job.diffusion, num_steps=self.num_steps))
        return JobSpec(
            workspace=self.workspace,
            stage="diffusion",
            key=KEY,
            version=1,
            entry="tests.chaos.stage:run",
            sections=("seed", "diffusion", "watching"),
            config_type="tests.chaos.stage:ChaosJob",
            config=to_json(job),
            input_keys={"latents": KEY},
            code_digest="chaos",
            tracking_uri=self.tracking_uri,
            run_ids={"mlflow": "chaos"} if self.tracking_uri else {},
        )

    def start(self) -> None:
        """Write the latents and start the first attempt."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_latents(Workspace(self.workspace))
        self._thread = threading.Thread(target=self._attempt_all, name="run", daemon=True)
        self._thread.start()

    def is_running(self) -> bool:
        """Whether an attempt is under way."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self, timeout_s: float) -> Outcome:
        """Wait for the end.

        Raises:
            TimeoutError: It did not end in time; it is stopped then.
            StageFailed: The last attempt failed.
        """
        assert self._thread is not None
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.stop()
            raise TimeoutError(f"the stage did not end within {timeout_s:.0f} s")
        if self._failure is not None:
            raise self._failure
        return read_outcome(Workspace(self.workspace))

    def stop(self) -> None:
        """End the job that runs."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(60)

    def _attempt_all(self) -> None:
        launcher = LocalLauncher(self.folder / "logs", self._stop)
        try:
            while True:
                self.attempts += 1
                try:
                    launcher.run(self.spec(), uses_ray=False, on_progress=lambda progress: None)
                    return
                except StageFailed as failure:
                    self.errors.append(str(failure))
                    if self.attempts == ATTEMPTS or failure.error.is_user_error:
                        raise
        except BaseException as error:
            self._failure = error
        finally:
            launcher.close()


def write_latents(workspace: Workspace) -> None:
    """The committed output of a stage `latents`, once."""

    def build() -> StageResult:
        ctx = StageContext(stage="latents", key=KEY, output_uri=workspace.stage_uri("latents", KEY))
        draw = np.random.default_rng(0)
        values = draw.standard_normal((SAMPLES, CHANNELS, SIDE, SIDE)).astype(np.float16)
        labels = draw.integers(0, CLASSES, SAMPLES)
        name = part_name("train", 0)
        part = write_latent_shard(ctx.output_uri, name, {"latent": values}, labels, first_id=0)
        shape = [CHANNELS, SIDE, SIDE]
        stats = {"mean": torch.zeros(shape), "var": torch.ones(shape)}
        counts = {"train": {"rows": SAMPLES, "shards": [SAMPLES]}, "shape": shape, "flip": False}
        return StageResult(
            files=[
                part.entry,
                write_index(ctx.output_uri, "train", [part]),
                ctx.put_bytes("stats.safetensors", save(stats)),
                ctx.put_json("counts.json", counts),
            ]
        )

    run_once(workspace, "latents", KEY, build)


def alone(folder: Path, num_steps: int) -> Outcome:
    """The same training on one rank in this process: no Ray, no pause, nothing happens to it."""
    workspace = Workspace(str(folder))
    write_latents(workspace)
    watching = Watching(journal_path=os.devnull, step_s=0.0)
    job = ChaosJob(watching=watching, compute=replace(COMPUTE, num_workers=1))
    latents = workspace.find("latents", KEY)
    assert latents is not None
    ctx = StageContext(
        stage="diffusion",
        key=KEY,
        output_uri=workspace.stage_uri("diffusion", KEY),
        inputs={"latents": latents},
        compute=job.compute,
    )
    torch.set_num_threads(1)
    diffusion = replace(job.diffusion, num_steps=num_steps)
    sections = {"seed": job.seed, "job": diffusion, "watching": watching}
    run_once(workspace, "diffusion", KEY, lambda: train(ctx, World(), **sections))
    return read_outcome(workspace)


def read_outcome(workspace: Workspace) -> Outcome:
    """Weights and losses of the committed stage, every file checked against its digest."""
    output = workspace.find("diffusion", KEY, verify="sha256")
    assert output is not None, "the stage has no committed output"
    names = output.names("dit", ".safetensors")
    log = output.local("train_log.jsonl").read_text().splitlines()
    rows: Sequence[dict[str, Any]] = [json.loads(line) for line in log]
    return Outcome(
        weights={name: output.entry(name).sha256 for name in names},
        losses=[row["train/loss"] for row in rows if "train/loss" in row],
    )
