"""`drorae reconstruct` and `drorae sample`: use the networks of a finished run."""

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from drorae.store.workspace import StageOutput, Workspace
from pipelines.plan import RunPlan, make_plan

TOKENIZER_STAGES = ("decoder", "fusion", "finetune")
GENERATOR_STAGES = ("latents", "diffusion")
STRENGTH = ("autoguidance", "internal", "cfg")
"""Guided ways of sampling, the best of the papers first."""


def reconstruct(options: argparse.Namespace, console: Console) -> int:
    """Write input, RAE and fused reconstructions of image files side by side."""
    missing = [path for path in options.images if not Path(path).is_file()]
    if missing:
        raise FileNotFoundError(f"image {missing[0]} does not exist; expected an image file.")
    check_out(options.out)
    outputs = committed(make_plan(options.request, reads_only=True), TOKENIZER_STAGES)

    from drorae.evaluation.grids import png_bytes  # torch takes seconds to import
    from drorae.evaluation.inference import reconstruct_files
    from drorae.evaluation.loading import load_tokenizer

    picture = reconstruct_files(load_tokenizer(outputs), options.images)
    return _write(options.out, png_bytes(picture), console)


def sample(options: argparse.Namespace, console: Console) -> int:
    """Write generated images of one class."""
    check_out(options.out)
    plan = make_plan(options.request, reads_only=True)
    guide = ("guide",) if "guide" in plan.keys else ()  # a recipe may have none
    outputs = committed(plan, TOKENIZER_STAGES + GENERATOR_STAGES + guide)
    num_classes = plan.full.diffusion.model.num_classes
    if not 0 <= options.label < num_classes:
        raise ValueError(
            f"--class {options.label} is out of range: expected 0 to {num_classes - 1}."
        )

    from drorae.evaluation.grids import image_grid, png_bytes, to_hwc
    from drorae.evaluation.inference import sample_images
    from drorae.evaluation.loading import load_generator, load_tokenizer
    from drorae.evaluation.tasks import sampler_settings

    evaluate = plan.full.evaluate
    guidance = options.guidance or _strongest(evaluate.guidances)
    if options.scale is not None and guidance != "unguided":
        evaluate = replace(evaluate, **{f"{guidance}_scale": options.scale})
    images = sample_images(
        load_tokenizer(outputs),
        load_generator(outputs),
        options.label,
        num_images=options.num,
        settings=sampler_settings(guidance, evaluate),
        seed=options.seed,
    )
    return _write(options.out, png_bytes(image_grid([to_hwc(images.numpy())])), console)


def _strongest(guidances: tuple[str, ...]) -> str:
    return next((name for name in STRENGTH if name in guidances), "unguided")


def committed(plan: RunPlan, names: tuple[str, ...]) -> dict[str, StageOutput]:
    """Outputs of a plan by stage.

    Raises:
        FileNotFoundError: If one is not there.
    """
    workspace = Workspace(plan.request.workspace)
    found = {n: workspace.find(n, plan.keys[n]) if n in plan.keys else None for n in names}
    missing = [name for name, output in found.items() if output is None]
    if missing:
        raise FileNotFoundError(
            f"stages {missing} of recipe {plan.request.recipe} are not in {workspace.uri}; "
            "`drorae run` with the same options builds them."
        )
    return {name: output for name, output in found.items() if output is not None}


def check_out(path: str, option: str = "--out") -> None:
    """Refuse a place that cannot be written before any work is done."""
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise ValueError(
            f"{option} {path} cannot be written: expected a file name in a folder that exists."
        )


def _write(path: str, content: bytes, console: Console) -> int:
    Path(path).write_bytes(content)
    console.print(path, highlight=False, markup=False, soft_wrap=True)
    return 0
