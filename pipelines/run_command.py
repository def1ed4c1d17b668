"""`drorae run`: the flow, embedded in this process."""

import argparse
import os
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from drorae.store import files
from drorae.store.workspace import Workspace
from pipelines.display import choose_display, format_duration
from pipelines.launch import StageFailed
from pipelines.plan import Request, RunPlan, make_plan
from pipelines.prefect_api import prefect_api, wait_until_ready
from pipelines.preflight import check_machine
from pipelines.quality import QualityTable, quality_tables
from pipelines.session import CONTROLS, Controls, local_root

EXIT_FAILED_STAGE = 1
EXIT_INTERRUPTED = 130
SAME_SIGNAL_S = 1.0
"""`timeout` and shells signal a process and then its group: a signal so soon is no second wish."""


def run(options: argparse.Namespace, console: Console) -> int:
    """Run the graph and print the results table; returns the exit code."""
    request: Request = options.request
    plan = make_plan(request)
    if plan.is_complete:
        outcomes = {step.stage: ("reused", None) for step in plan.steps if step.selected}
        show_results(plan, outcomes, console)
        return 0
    workspace = Workspace(request.workspace)
    workspace.check()
    check_machine(plan, local_root(workspace))
    _announce(plan, console)
    return _run_flow(plan, options, workspace, console)


def _announce(plan: RunPlan, console: Console) -> None:
    for step in plan.steps:
        if step.must_run:
            console.print(
                f"{step.stage}: {step.state}: {step.reason}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        elif step.code_changed and step.selected:
            console.print(f"{step.stage}: reused, code changed since", highlight=False)


def _run_flow(
    plan: RunPlan, options: argparse.Namespace, workspace: Workspace, console: Console
) -> int:
    controls = Controls(
        display=choose_display(console), stop=threading.Event(), sources=plan.sources
    )
    token = CONTROLS.set(controls)
    try:
        with _stop_on_signals(controls.stop), prefect_api(local_root(workspace)) as server:
            _call_flow(plan.request, options, server)
    except StageFailed as error:
        _say(f"error: {error}")
        return EXIT_FAILED_STAGE
    except BaseException:
        # Prefect raises a signal of its own kind for SIGTERM.
        if not controls.stop.is_set():
            raise
        _say("interrupted; the same command continues where this run stopped.")
        return EXIT_INTERRUPTED
    finally:
        controls.display.close()
        CONTROLS.reset(token)
    outcomes = {name: (o.outcome, o.wall_s) for name, o in controls.outcomes.items()}
    asked = replace(plan.request, force=(), strict_code=False)
    show_results(make_plan(asked, plan.sources), outcomes, console)
    return 0


def _say(text: str) -> None:
    Console(stderr=True).print(f"drorae: {text}", highlight=False, markup=False, soft_wrap=True)


def _call_flow(
    request: Request, options: argparse.Namespace, server: subprocess.Popen | None
) -> None:
    # Prefect takes seconds to import and reads its settings then, so it comes after `prefect_api`.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pipelines.graph import drorae

        wait_until_ready(server)
        drorae(
            recipe=request.recipe,
            overrides=list(request.overrides),
            only=request.only,
            from_stage=request.from_stage,
            force=list(request.force),
            workspace=request.workspace,
            jobs=options.jobs,
            retries=options.retries,
            strict_code=request.strict_code,
        )


@contextmanager
def _stop_on_signals(stop: threading.Event) -> Iterator[None]:
    """End the stage jobs at the first Ctrl-C or SIGTERM, and this process at the second."""
    first_s = 0.0

    def handle(number: int, _frame: object) -> None:
        nonlocal first_s
        if not stop.is_set():
            first_s = time.monotonic()
            stop.set()
        elif time.monotonic() - first_s > SAME_SIGNAL_S:
            # The children notice that we are gone and end themselves.
            os._exit(128 + number)

    before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show_results(
    plan: RunPlan, outcomes: Mapping[str, tuple[str, float | None]], console: Console
) -> None:
    """Print a row per stage of a finished run, what evaluation found, and the report's path."""
    table = Table("stage", "outcome", "time", "key", box=None, pad_edge=False)
    found: list[QualityTable] = []
    for step in plan.steps:
        if step.stage in outcomes:
            outcome, wall_s = outcomes[step.stage]
            table.add_row(step.stage, outcome, format_duration(wall_s), step.key)
            found += quality_tables(step.metrics)
    console.print(table)
    for title, columns, rows in found:
        quality = Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)
        for row in rows:
            quality.add_row(*row)
        console.print()
        console.print(quality)
    console.print()
    if "report" in outcomes:
        _say_path(console, report_uri(plan))


def report_uri(plan: RunPlan) -> str:
    """Return where the report of a plan is."""
    workspace = Workspace(plan.request.workspace)
    return files.join(workspace.stage_uri("report", plan.keys["report"]), "report.html")


def _say_path(console: Console, uri: str) -> None:
    console.print(f"report: {uri}", highlight=False, markup=False, soft_wrap=True)
