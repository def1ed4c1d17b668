"""The commands that only look: plan, status, recipes, report; and the one that fetches assets."""

import argparse
import json
import webbrowser
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from drorae import recipes
from drorae.config import field_docs, to_json
from drorae.cost.budgets import GPU_COUNTS, Budget, Cluster, budgets
from drorae.store.manifest import DamagedOutput, Manifest
from drorae.store.workspace import Verify, Workspace
from pipelines.budget_display import budgets_json, print_budgets
from pipelines.cost_display import check_rate, cost_json, print_cost
from pipelines.display import format_duration
from pipelines.plan import RunPlan, Step, configuration, make_plan
from pipelines.run_command import report_uri

if TYPE_CHECKING:
    from drorae.cost.run import RunCost

EXIT_DAMAGED = 1


def show_plan(options: argparse.Namespace, console: Console) -> int:
    """Print what a run would do with every stage."""
    plan = make_plan(options.request)
    wants_cost = plan.full.compute.use_gpu and not options.json
    cost = _cost(plan, options) if (wants_cost if options.cost is None else options.cost) else None
    if options.json:
        shown = {} if cost is None else {"cost": _cost_json(plan, cost, options)}
        console.print_json(json.dumps(_plan_json(plan) | shown))
        return 0
    _print_plan(plan, console)
    if cost is not None:
        print_cost(cost, options.peak_tflops, options.mfu, console)
        _print_budgets(plan, cost, options, console)
    return 0


def _cost_json(plan: RunPlan, cost: "RunCost", options: argparse.Namespace) -> dict[str, Any]:
    counted = cost_json(cost, options.peak_tflops, options.mfu)
    return counted | budgets_json(_budgets(plan, cost, options), _cluster(options))


def _print_budgets(
    plan: RunPlan, cost: "RunCost", options: argparse.Namespace, console: Console
) -> None:
    from drorae.cost.loads import shard_cpu_s  # imports torch

    num_images = cost.num_train_images + cost.num_val_images
    shards = any(step.stage == "shard" and step.must_run for step in plan.steps)
    shard_s = shard_cpu_s(plan.full, num_images) if shards else 0.0
    print_budgets(_budgets(plan, cost, options), _cluster(options), shard_s, console)


def _budgets(plan: RunPlan, cost: "RunCost", options: argparse.Namespace) -> list[Budget]:
    from drorae.cost.loads import count_loads  # imports torch

    loads = count_loads(plan.full, cost, options.peak_tflops, options.mfu)
    return budgets(loads, GPU_COUNTS, _cluster(options))


def _cluster(options: argparse.Namespace) -> Cluster:
    return Cluster(
        gpus_per_node=options.gpus_per_node,
        cores_per_gpu=options.cores_per_gpu,
        network_gbps=options.network_gbps,
    )


def _cost(plan: RunPlan, options: argparse.Namespace) -> "RunCost | None":
    """What would run; None if that is nothing."""
    check_rate(options.peak_tflops, options.mfu)
    _cluster(options)  # refuses one that cannot be before the seconds below
    stages = [step.stage for step in plan.steps if step.must_run]
    if not stages:
        return None
    # Builds all networks on the meta device: seconds, most of them for imports.
    from drorae.cost.run import count_run

    return count_run(plan.full, stages, options.train_images)


def _print_plan(plan: RunPlan, console: Console) -> None:
    table = Table("stage", "would", "key", "time", "why", box=None, pad_edge=False)
    for step in plan.steps:
        table.add_row(
            step.stage, _would(step), step.key, format_duration(step.expected_wall_s), _why(step)
        )
    console.print(table)
    costs = [step.expected_wall_s for step in plan.steps if step.must_run]
    known = [cost for cost in costs if cost is not None]
    if costs:
        unknown = (
            f" and {len(costs) - len(known)} of unknown time" if len(known) < len(costs) else ""
        )
        console.print(
            f"{len(costs)} stages to run: {format_duration(sum(known))} "
            f"by their last build{unknown}"
        )


def _plan_json(plan: RunPlan) -> dict[str, Any]:
    steps = [to_json(step) | {"must_run": step.must_run} for step in plan.steps]
    return {"recipe": plan.request.recipe, "run_key": plan.run_key, "stages": steps}


def _would(step: Step) -> str:
    if not step.selected:
        return "leave out"
    return "run" if step.must_run else "reuse"


def _why(step: Step) -> str:
    if step.code_changed and step.state == "present":
        return "code changed since"
    return f"{step.state}: {step.reason}" if step.reason else step.state


def show_status(options: argparse.Namespace, console: Console) -> int:
    """Print every output of a workspace; exit code 1 if one is damaged."""
    workspace = Workspace(options.workspace)
    verify: Verify = "sha256" if options.verify else "size"
    rows = [(manifest, _problems(workspace, manifest, verify)) for manifest in workspace.outputs()]
    if options.json:
        console.print_json(json.dumps([_status_json(*row) for row in rows]))
    else:
        _print_status(rows, workspace, console)
    return EXIT_DAMAGED if any(problems for _, problems in rows) else 0


def _problems(workspace: Workspace, manifest: Manifest, verify: Verify) -> list[str]:
    try:
        workspace.find(manifest.stage, manifest.key, verify)
    except DamagedOutput as error:
        return list(error.problems)
    return []


def _status_json(manifest: Manifest, problems: list[str]) -> dict[str, Any]:
    return to_json(manifest) | {"problems": problems}


def _print_status(
    rows: list[tuple[Manifest, list[str]]], workspace: Workspace, console: Console
) -> None:
    table = Table("stage", "key", "state", "files", "MB", "time", "made", box=None, pad_edge=False)
    for manifest, problems in rows:
        megabytes = sum(entry.size_bytes for entry in manifest.files) / 1e6
        table.add_row(
            manifest.stage,
            manifest.key,
            "damaged" if problems else "ok",
            str(len(manifest.files)),
            f"{megabytes:.1f}",
            format_duration(manifest.wall_s),
            manifest.created_at[:19],
        )
    console.print(table)
    for manifest, problems in rows:
        for problem in problems:
            _line(console, f"damaged: {manifest.stage}/{manifest.key}/{problem}")
    if not rows:
        _line(console, f"no output in {workspace.uri}")


def list_recipes(options: argparse.Namespace, console: Console) -> int:
    """Print every recipe with the first line of its description."""
    table = Table("recipe", "what", box=None, pad_edge=False)
    for name in recipes.names():
        table.add_row(name, recipes.describe(name).partition("\n")[0])
    console.print(table)
    return 0


def show_recipe(options: argparse.Namespace, console: Console) -> int:
    """Print every field of a recipe with its value, meaning and source."""
    full = configuration(options.recipe, options.overrides)
    if options.json:
        console.print_json(json.dumps(to_json(full)))
        return 0
    console.print(recipes.describe(options.recipe), highlight=False, markup=False)
    table = Table("field", "value", "meaning and source", box=None, pad_edge=False)
    for row in field_docs(full):
        table.add_row(row.path, str(row.value), row.doc)
    console.print(table, markup=False)
    return 0


def show_report(options: argparse.Namespace, console: Console) -> int:
    """Print where the report of a configuration is, and open it if asked to."""
    plan = make_plan(options.request, reads_only=True)
    state = {step.stage: step.state for step in plan.steps}["report"]
    if state != "present":
        raise FileNotFoundError(
            f"the report of recipe {options.recipe} is {state} in {options.workspace}; "
            "`drorae run` with the same options makes it."
        )
    uri = report_uri(plan)
    _line(console, uri)
    if options.open and not webbrowser.open(uri if "://" in uri else f"file://{uri}"):
        raise RuntimeError(f"no browser could be started; open {uri} yourself.")
    return 0


def fetch_assets(options: argparse.Namespace, console: Console) -> int:
    """Download, check and convert assets."""
    from drorae.data.assets.fetch import fetch  # converts with torch, seconds to import

    fetch(options.names, _notifier(console))
    return 0


def list_assets(options: argparse.Namespace, console: Console) -> int:
    """Print every asset and whether it is here."""
    from drorae.data.assets.catalog import ASSETS, asset_path

    table = Table("asset", "here", box=None, pad_edge=False)
    for name in ASSETS:
        try:
            table.add_row(name, str(asset_path(name)))
        except FileNotFoundError:
            table.add_row(name, "no; `drorae assets fetch smoke`")
    console.print(table)
    return 0


def _notifier(console: Console) -> Callable[[str], None]:
    return lambda text: _line(console, text)


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
