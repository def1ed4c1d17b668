"""What the stages of one pipeline run share, and how each stage ended."""

import os
import threading
import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from drorae.config import to_json
from drorae.store.workspace import StageOutput, Workspace
from pipelines import stages
from pipelines.attempt import JobSpec
from pipelines.code_version import entry_digest
from pipelines.display import Display, LineDisplay
from pipelines.launch import Launcher, LocalLauncher, StageFailed, Stopped
from pipelines.launch_ray import RayJobLauncher
from pipelines.plan import RunPlan, Step
from pipelines.runs import TrackedRuns, tracking_uri
from pipelines.slots import Slots
from pipelines.sources import Sources, keep

RAY_ADDRESS_VARIABLE = "DRORAE_RAY_ADDRESS"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a stage of this run ended well."""

    stage: str
    """Its name."""
    outcome: str
    """`built`, `reused`, or `waited` for another run that built it."""
    uri: str
    """Address of the output."""
    wall_s: float
    """Seconds in this run."""
    metrics: dict[str, float | None]
    """Final numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Controls:
    """The caller's side of a run: where progress shows, and how to stop it."""

    display: Display
    """Told about every change."""
    stop: threading.Event
    """Set to end the run; its stage jobs end and can be continued."""
    outcomes: dict[str, "Outcome"] = field(default_factory=dict)
    """Filled by the run: how each stage ended, by name."""
    sources: Sources | None = None
    """What the caller's plan found in the image sources; None: the run looks at them."""


CONTROLS: ContextVar[Controls | None] = ContextVar("controls", default=None)
SESSION: ContextVar["Session"] = ContextVar("session")


def local_root(workspace: Workspace) -> Path:
    """Return the folder on this machine for logs, databases and locks of a workspace."""
    # <root>/logs/<stage>/<key>/attempt-N.log; for s3:// the root lies in the user's cache.
    return workspace.log_path("services", "prefect", 0).parents[3]


def cluster_address() -> str | None:
    """Return the Jobs API of the Ray cluster that stages run on; None runs them on this machine."""
    return os.environ.get(RAY_ADDRESS_VARIABLE) or None


class Session:
    """One pipeline run.

    Args:
        plan: What to do.
        jobs: Stage jobs at the same time; None takes `compute.parallel_stages`, and no limit on a
            cluster.
        prefect_run_id: Id of the Prefect run, for manifests.
    """

    def __init__(self, plan: RunPlan, jobs: int | None, prefect_run_id: str):
        controls = CONTROLS.get() or Controls(
            display=LineDisplay(Console()), stop=threading.Event()
        )
        self.plan = plan
        self.outcomes = controls.outcomes
        self._stop = controls.stop
        self._display = controls.display
        self._workspace = Workspace(plan.request.workspace)
        self._prefect_run_id = prefect_run_id
        self._steps = {step.stage: step for step in plan.steps}
        self._shown: set[tuple[str, str]] = set()
        root, address = local_root(self._workspace), cluster_address()
        self._slots = Slots(
            jobs or (len(plan.steps) if address else plan.full.compute.parallel_stages)
        )
        self._launcher: Launcher = (
            RayJobLauncher(address, self._stop, dict(os.environ))
            if address
            else LocalLauncher(root / "logs" / "services", self._stop)
        )
        self._runs = TrackedRuns(
            plan,
            tracking_uri(root, is_shared=address is not None),
            root,
            {"drorae.recipe": plan.request.recipe, "prefect.run": prefect_run_id},
        )

    def run(self, name: str) -> str:
        """Bring one stage to its output, and return the output's address.

        Raises:
            StageFailed: If its job ends badly.
            Stopped: If the run was asked to end.
            ValueError: If a later stage cannot work with the output.
        """
        step = self._steps[name]
        if not step.must_run:
            self._record(step, "reused", 0.0)
            return self.outcomes[name].uri
        stage = stages.find_stage(name, stages.STAGES)
        position = [stage.name for stage in stages.STAGES].index(name)
        with self._slots.take(stages.chain_length(name, stages.STAGES), position):
            if self._stop.is_set():
                raise Stopped(f"stage {name} was not started; the next run does it.")
            started_s = time.monotonic()
            self._display.started(name)
            outcome = self._launch(stage, step)
            self._record(step, outcome, time.monotonic() - started_s)
        output = self._find(step)
        self._show_notes(name, stage.notes(output))
        stages.check_output(self.plan.full, name, output, self.plan.stages_to_run())
        return self.outcomes[name].uri

    def stop(self) -> None:
        """Ask all running stage jobs to end."""
        self._stop.set()

    def close(self) -> None:
        """End what the stages shared."""
        self._launcher.close()
        is_done = all(step.stage in self.outcomes for step in self.plan.steps if step.selected)
        self._runs.close("FINISHED" if is_done else "FAILED")

    def _launch(self, stage: stages.Stage, step: Step) -> str:
        read = stage.sources(self.plan.full)
        keep([f for p, f in self.plan.sources.items() if p in read], self._workspace)
        spec = self._spec(stage, step)
        try:
            result = self._launcher.run(
                spec,
                uses_ray=stage.uses_ray,
                on_progress=lambda progress: self._show(stage.name, progress),
            )
        except Stopped:
            self._runs.finish_stage(stage.name, "KILLED")
            raise
        except StageFailed as failure:
            self._runs.finish_stage(stage.name, "FAILED")
            # What is final ends the run, whose last line says it; others are tried again.
            error = failure.error
            why = f"see {failure.log_path}" if error.is_final else error.message
            self._display.note(f"{stage.name}: failed: {why}")
            raise
        self._runs.finish_stage(stage.name, "FINISHED")
        return result.outcome

    def _show(self, name: str, progress: dict[str, Any]) -> None:
        self._show_notes(name, progress.get("notes", ()))
        self._display.progress(name, progress)

    def _show_notes(self, name: str, lines: Sequence[str]) -> None:
        """Show lines about a stage, each once."""
        for line in lines:
            if (name, line) not in self._shown:
                self._shown.add((name, line))
                self._display.note(f"{name}: {line}")

    def _spec(self, stage: stages.Stage, step: Step) -> JobSpec:
        full = self.plan.full
        run_ids = {
            "prefect": self._prefect_run_id,
            "mlflow": self._runs.open_stage(stage) or "",
        }
        return JobSpec(
            workspace=self._workspace.uri,
            stage=stage.name,
            key=step.key,
            version=stage.version,
            entry=stage.entry,
            sections=stage.sections,
            config_type=f"{type(full).__module__}:{type(full).__qualname__}",
            config=to_json(full),
            input_keys=self.plan.input_keys(stage),
            asking=tuple(asking.name for asking in self.plan.stages_to_run()),
            sources=stages.source_digests(full, stage, self.plan.sources),
            code_digest=entry_digest(stage.entry),
            force=step.state in ("forced", "code changed"),
            tracking_uri=self._runs.uri,
            run_ids={name: value for name, value in run_ids.items() if value},
            driver=stage.driver,
            workers=stage.workers,
        )

    def _find(self, step: Step) -> StageOutput:
        output = self._workspace.find(step.stage, step.key, verify="none")
        assert output is not None
        return output

    def _record(self, step: Step, outcome: str, wall_s: float) -> None:
        output = self._find(step)
        self._display.finished(step.stage, outcome, wall_s)
        self.outcomes[step.stage] = Outcome(
            stage=step.stage,
            outcome=outcome,
            uri=output.uri,
            wall_s=wall_s,
            metrics=dict(output.manifest.metrics),
        )
