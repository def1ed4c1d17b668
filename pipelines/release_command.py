"""`drorae import` and `drorae export`: released weights into a workspace, and out of it.

An import is the stage `decoder` with `decoder.released`, run in this process: it needs neither Ray
nor Prefect nor shards. Its key covers the content of the files, so later runs may name the file
wherever it lies, or by `sha256:...` as the command prints it.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from drorae.store.content import content_id
from drorae.store.context import StageContext, StageResult
from drorae.store.files import join
from drorae.store.stage_run import run_once
from drorae.store.workspace import StageOutput, Workspace
from pipelines import stages
from pipelines.code_version import entry_digest
from pipelines.models_command import check_out, committed
from pipelines.plan import RunPlan, make_plan

EXPORTED_STAGES = ("decoder", "finetune", "control", "fusion", "diffusion", "guide")


def import_decoder(options: argparse.Namespace, console: Console) -> int:
    """Commit released files as the output of stage `decoder`, and print how runs name it."""
    settings = [f"decoder.released={options.decoder}"]
    settings += [f"decoder.released_stats={options.stats}"] if options.stats else []
    request = replace(options.request, overrides=(*options.request.overrides, *settings))
    plan = make_plan(replace(request, only="decoder"), reads_only=True)
    workspace = Workspace(request.workspace)
    workspace.check()
    key = plan.keys["decoder"]
    output, how = run_once(
        workspace,
        "decoder",
        key,
        lambda: _build(plan, workspace),
        manifest_fields=_manifest_fields(plan),
    )
    found = output.read_json("config.json")["found"]
    where = join(output.uri, "decoder.safetensors")
    _say(console, f"{how}: {where}")
    _say(console, f"file: {found['container']}, weights: {found['weights']}")
    _say(console, f"use it with {_flags(options)}")
    return 0


def _build(plan: RunPlan, workspace: Workspace) -> StageResult:
    from drorae.training.stages import run_decoder  # torch takes seconds to import

    stage = stages.find_stage("decoder", stages.STAGES)
    key = plan.keys["decoder"]
    ctx = StageContext(
        stage="decoder",
        key=key,
        output_uri=workspace.stage_uri("decoder", key),
        inputs={},
        compute=plan.full.compute,
    )
    return run_decoder(ctx, **stages.section_values(plan.full, stage))


def _manifest_fields(plan: RunPlan) -> dict:
    stage = stages.find_stage("decoder", stages.STAGES)
    return {
        "version": stage.version,
        "config": stages.section_json(plan.full, stage),
        "input_keys": plan.input_keys(stage),
        "seed": plan.full.seed,
        "code_digest": entry_digest(stage.entry),
    }


def _flags(options: argparse.Namespace) -> str:
    flags = [f"--set decoder.released={content_id(options.decoder)}"]
    if options.stats:
        flags.append(f"--set decoder.released_stats={content_id(options.stats)}")
    return " ".join(flags)


def export(options: argparse.Namespace, console: Console) -> int:
    """Write the averaged weights of a stage, and on request the statistics of its latents."""
    file_format = options.format or ("safetensors" if _is_safetensors(options.out) else "rae")
    if _is_safetensors(options.out) != (file_format == "safetensors"):
        raise ValueError(
            f"--out {options.out} does not fit --format {file_format}: expected a name that ends "
            f"in {'.safetensors' if file_format == 'safetensors' else '.pt'}."
        )
    for path in filter(None, (options.out, options.stats)):
        check_out(path)
    plan = make_plan(options.request, reads_only=True)
    output = committed(plan, (options.stage,))[options.stage]
    stats_of = _stats_output(plan, options.stage) if options.stats else None

    from drorae.training.released import export_stats, export_weights  # imports torch

    num_tensors = export_weights(output, options.out, file_format)
    _say(console, f"{options.out}: {num_tensors} tensors, averaged (EMA) weights")
    if stats_of is not None:
        is_safetensors = _is_safetensors(options.stats)
        export_stats(stats_of, options.stats, "safetensors" if is_safetensors else "rae")
        _say(console, f"{options.stats}: mean and variance per element of the latents")
    return 0


def _stats_output(plan: RunPlan, stage: str) -> StageOutput:
    """The output with the statistics: an imported decoder's own, else those of `latents`."""
    is_imported = stage == "decoder" and plan.full.decoder.released_stats
    name = "decoder" if is_imported else "latents"
    return committed(plan, (name,))[name]


def _is_safetensors(path: str) -> bool:
    return Path(path).suffix == ".safetensors"


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
