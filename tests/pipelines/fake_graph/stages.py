"""A tiny graph without training: a -> b -> (c, d) -> report; every run of a stage is noted."""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import pipelines.stages
from drorae.config import Compute
from drorae.store.context import StageContext, StageResult
from pipelines.stages import Stage

ENTRY = "fake_graph.stages"


@dataclass(frozen=True, kw_only=True, slots=True)
class FakeStage:
    """What one fake stage does."""

    text: str = "x"
    """Written into the output."""
    sleep_s: float = 0.0
    """Seconds of work, in ten steps with a checkpoint each."""
    fail_attempts: int = 0
    """Attempts that fail before one succeeds."""
    user_error: bool = False
    """Whether a failure is the user's."""
    source: str = ""
    """Image source; only the key of stage a covers what it contains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FakeJob:
    """Configuration of the fake graph."""

    recipe: str = "fake"
    """Name."""
    seed: int = 0
    """Seed."""
    a: FakeStage = field(default_factory=FakeStage)
    """First."""
    b: FakeStage = field(default_factory=FakeStage)
    """Second."""
    c: FakeStage = field(default_factory=FakeStage)
    """Beside d."""
    d: FakeStage = field(default_factory=FakeStage)
    """Beside c."""
    report: FakeStage = field(default_factory=FakeStage)
    """Last."""
    with_d: bool = True
    """Whether d exists."""
    compute: Compute = field(default_factory=Compute)
    """How."""


def _stage(name: str, *needs: str, **more) -> Stage:
    return Stage(
        name=name,
        needs=needs,
        sections=("seed", name),
        entry=f"{ENTRY}:run_{name}",
        uses_ray=False,
        **more,
    )


TABLE = (
    _stage("a", sources=lambda full: ("a.source",)),
    _stage("b", "a"),
    _stage("c", "b"),
    _stage("d", "b", enabled=lambda full: full.with_d),
    _stage("report", "a", "b", "c", "d"),
)


def journal() -> Path:
    return Path(os.environ["FAKE_JOURNAL"])


def events() -> list[dict]:
    path = journal()
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def built() -> list[str]:
    return [event["stage"] for event in events() if event["event"] == "done"]


def _write(ctx: StageContext, event: str, **more) -> None:
    line = {"stage": ctx.stage, "event": event, "time": time.time(), "attempt": ctx.attempt} | more
    with journal().open("a") as out:
        out.write(json.dumps(line) + "\n")


def _run(ctx: StageContext, job: FakeStage) -> StageResult:
    _write(ctx, "start")
    marker = Path(ctx.work_uri) / "checkpoint"
    first = int(marker.read_text()) if marker.exists() else 0
    _write(ctx, "resume", step=first)
    if ctx.attempt <= job.fail_attempts:
        error = ValueError if job.user_error else RuntimeError
        raise error(f"planned failure of {ctx.stage}")
    for step in range(first, 10):
        time.sleep(job.sleep_s / 10)
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text(str(step + 1))
        ctx.progress(step + 1, 10, "steps", images_per_s=1.0)
    name = "report.html" if ctx.stage == "report" else "out.txt"
    texts = [output.stage + "=" + output.key for output in _manifests(ctx)]
    entry = ctx.put_bytes(name, "\n".join([job.text, *texts]).encode())
    _write(ctx, "done")
    return StageResult(files=[entry], metrics={"fake/steps": 10.0})


def _manifests(ctx: StageContext) -> list:
    return [output.manifest for output in ctx.inputs.values()]


def run_a(ctx: StageContext, seed: int, a: FakeStage) -> StageResult:
    return _run(ctx, a)


def run_b(ctx: StageContext, seed: int, b: FakeStage) -> StageResult:
    return _run(ctx, b)


def run_c(ctx: StageContext, seed: int, c: FakeStage) -> StageResult:
    return _run(ctx, c)


def run_d(ctx: StageContext, seed: int, d: FakeStage) -> StageResult:
    return _run(ctx, d)


def run_report(ctx: StageContext, seed: int, report: FakeStage) -> StageResult:
    return _run(ctx, report)


def fake_get(name: str) -> FakeJob:
    if name != "fake":
        raise ValueError(f"{name!r} is no recipe; expected one of: fake.")
    return FakeJob()


def install() -> None:
    """Put the fake graph in place of the real one, in this process."""
    # Not at the top: the stage jobs import this module and need no recipes.
    from drorae import recipes

    pipelines.stages.STAGES = TABLE
    recipes.get = fake_get
    recipes.names = lambda: ["fake"]
    recipes.describe = lambda name: "A fake recipe.\nMore."
