"""Entry functions of the `evaluate` and `report` stages: what the stage table names.

`run_evaluate` measures reconstruction, generation and the inside of the fusion, and writes
metrics.json, per_image.parquet and grids/*.png. The work is done by actors (`workers`) in tasks
(`tasks`); this process hands them out and puts the results together. It loads no network and holds
no images beside those that are shown; its memory grows by 16 bytes per held-out photo and model.
`run_report` arranges finished stages on one HTML page and computes nothing new.
"""

import functools
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from drorae.data.shard_map import Executor, map_shards
from drorae.evaluation.grids import image_grid, png_bytes, to_hwc
from drorae.evaluation.job import EvaluateJob, ReportJob
from drorae.evaluation.protocol import protocol
from drorae.evaluation.reconstruction import (
    Reconstructions,
    join_chunks,
    model_latents,
    per_image_table,
    summarise,
)
from drorae.evaluation.report import render
from drorae.evaluation.report_data import collect
from drorae.evaluation.stored import read_arrays, values_uri
from drorae.evaluation.tasks import PHOTOS, Extent, image_tasks, measure_tasks, photo_set
from drorae.evaluation.workers import ImageWorker, MeasureWorker
from drorae.models.encoder_config import EncoderConfig
from drorae.store.context import StageContext, StageResult
from drorae.store.files import FileEntry
from drorae.tracking import connect

__all__ = ["run_evaluate", "run_report"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """What the parts of one evaluation share."""

    ctx: StageContext
    evaluate: EvaluateJob
    encoder: EncoderConfig
    seed: int
    extent: Extent
    executor: Executor | None


def run_evaluate(
    ctx: StageContext,
    *,
    seed: int,
    encoder: EncoderConfig,
    evaluate: EvaluateJob,
    executor: Executor | None = None,
) -> StageResult:
    """Measure everything that the run has trained.

    Args:
        ctx: The stage; inputs are shard, decoder, fusion, finetune, latents, diffusion, guide and
            perhaps control. Finished tasks under its work folder are not done again.
        seed: Seed of noise, untrained network, bootstrap and perturbations.
        encoder: The frozen encoder.
        evaluate: What to measure.
        executor: Who runs the tasks; Ray Data unless given.

    Raises:
        ValueError: More held-out photos are asked for than there are.
    """
    run = _Run(
        ctx=ctx,
        evaluate=evaluate,
        encoder=encoder,
        seed=seed,
        extent=_extent(ctx, evaluate),
        executor=executor,
    )
    made = _make_pictures(run)
    generation = _measure(run)
    starts = range(0, run.extent.num_photos, evaluate.chunk_photos)
    found = join_chunks([read_arrays(values_uri(ctx.work_uri, PHOTOS, s)) for s in starts])
    metrics = _metrics(run, found, generation, made)
    return _write(ctx, metrics, _pictures(run, found, made["inspect"]["has_routing"]), found)


def run_report(ctx: StageContext, *, recipe: str, report: ReportJob) -> StageResult:
    """Write report.html from all finished stages.

    Args:
        ctx: The stage; every other stage is an input.
        recipe: Name of the recipe, shown on the page.
        report: Title and figure settings.
    """
    data = collect(ctx.inputs, recipe=recipe, max_points=report.max_curve_points)
    page = render(data, report).encode()
    entry = ctx.put_bytes("report.html", page)
    with tempfile.TemporaryDirectory(prefix="drorae-report-") as folder:
        # The tracker wants a local file; the output may lie on S3.
        copy = Path(folder) / "report.html"
        copy.write_bytes(page)
        tracker = connect(ctx)
        try:
            tracker.artifact(copy, "report")
        finally:
            tracker.close()  # waits for the upload, so the folder may go
    return StageResult(files=[entry], metrics={"report/size_bytes": float(entry.size_bytes)})


def _extent(ctx: StageContext, evaluate: EvaluateJob) -> Extent:
    counts = ctx.inputs["shard"].read_json("counts.json")
    held_out, train = int(counts["val"]["rows"]), int(counts["train"]["rows"])
    wanted = evaluate.num_val_images or held_out
    if wanted > held_out:
        raise ValueError(
            f"evaluate.num_val_images={wanted} exceeds the {held_out} held-out photos: use at "
            "most that many, or 0 for all."
        )
    return Extent(
        num_photos=wanted,
        num_real=min(evaluate.num_samples, train),
        models=tuple(model_latents(ctx.inputs)),
    )


def _make_pictures(run: _Run) -> dict[str, dict[str, Any]]:
    """Results of all tasks that make pictures, by their names."""
    ctx, tasks = run.ctx, image_tasks(run.evaluate, run.extent)
    results = map_shards(
        tasks,
        functools.partial(ImageWorker, ctx, run.encoder, run.evaluate, run.seed),
        work_uri=ctx.work_uri,
        compute=ctx.compute,
        on_progress=lambda done, total: ctx.progress(
            done, total, "passes", message="reconstructing photos and drawing samples"
        ),
        worker=ctx.workers,
        executor=run.executor,
    )
    return {task.name: result for task, result in zip(tasks, results, strict=True)}


def _measure(run: _Run) -> dict[str, dict[str, Any]]:
    """Distances of every set from the reference photos, by set."""
    ctx, tasks = run.ctx, measure_tasks(run.evaluate, run.extent)
    results = map_shards(
        tasks,
        functools.partial(MeasureWorker, ctx, run.evaluate, run.extent),
        work_uri=ctx.work_uri,
        compute=ctx.compute,
        on_progress=lambda done, total: ctx.progress(
            done, total, "sets", message="measuring distances"
        ),
        worker=ctx.workers,
        executor=run.executor,
    )
    return {task.payload["set"]: result for task, result in zip(tasks, results, strict=True)}


def _feature_identity(made: dict[str, dict[str, Any]]) -> str:
    found = {result["feature_identity"] for result in made.values() if "feature_identity" in result}
    if len(found) > 1:
        raise RuntimeError(
            f"actors computed features with different weights, {sorted(found)}: expected one file "
            "on all machines; install the same assets everywhere and run again."
        )
    return found.pop()


def _metrics(
    run: _Run,
    found: Reconstructions,
    generation: dict[str, dict[str, Any]],
    made: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    evaluate = run.evaluate
    means, differences = summarise(found, replicates=evaluate.bootstrap_replicates, seed=run.seed)
    reconstruction: dict[str, dict[str, Any]] = {
        model: {metric: interval.as_dict() for metric, interval in columns.items()}
        for model, columns in means.items()
    }
    for model, columns in reconstruction.items():
        measured = generation[photo_set(model, evaluate, run.extent)]
        columns["fd"] = {"mean": measured["fd"], "lo": None, "hi": None}
    return {
        "reconstruction": reconstruction,
        "differences": {
            pair: {metric: interval.as_dict() for metric, interval in columns.items()}
            for pair, columns in differences.items()
        },
        "generation": {
            name: row for name, row in generation.items() if not name.startswith(f"{PHOTOS}/")
        },
        "diagnostics": made["inspect"]["report"],
        "meta": protocol(
            evaluate,
            run.encoder,
            seed=run.seed,
            num_val_images=run.extent.num_photos,
            feature_identity=_feature_identity(made),
            input_keys={name: output.key for name, output in run.ctx.inputs.items()},
        ),
    }


def _pictures(run: _Run, found: Reconstructions, has_routing: bool) -> dict[str, np.ndarray]:
    evaluate, work_uri = run.evaluate, run.ctx.work_uri
    rows = [to_hwc(images) for images in found.shown.values()]
    pictures = {"reconstruction": image_grid(rows, row_labels=list(found.shown))}
    class_names = run.ctx.inputs["shard"].read_json("counts.json")["class_names"]
    config = run.ctx.inputs["diffusion"].read_json("config.json")["model"]
    classes = int(config["num_classes"])
    for guidance in evaluate.guidances:
        images = _samples_by_class(run, guidance, classes)
        # The number stands first: names may share their beginning, or have no letter of the font.
        named = {i: f"{i} {name}" for i, name in enumerate(class_names) if name != str(i)}
        labels = [named.get(i, str(i)) for i in images]
        pictures[f"samples-{guidance}"] = image_grid(list(images.values()), row_labels=labels)
    if has_routing:
        pictures["routing"] = read_arrays(values_uri(work_uri, "routing", 0))["picture"]
    return pictures


def _samples_by_class(run: _Run, guidance: str, classes: int) -> dict[int, np.ndarray]:
    """Pictures that are shown, [N, H, W, 3] by class; only the first chunks hold any."""
    evaluate = run.evaluate
    last = min(evaluate.num_samples, classes * evaluate.num_grid_images)
    chunks = [
        read_arrays(values_uri(run.ctx.work_uri, guidance, start))
        for start in range(0, last, evaluate.chunk_samples)
    ]
    index = np.concatenate([chunk["index"] for chunk in chunks])
    images = to_hwc(np.concatenate([chunk["images"] for chunk in chunks]))
    shown = range(min(evaluate.num_grid_classes, classes))
    return {label: images[index % classes == label] for label in shown}


def _write(
    ctx: StageContext,
    metrics: dict[str, Any],
    pictures: dict[str, np.ndarray],
    found: Reconstructions,
) -> StageResult:
    buffer = io.BytesIO()
    pq.write_table(per_image_table(found), buffer)
    entries: list[FileEntry] = [
        ctx.put_json("metrics.json", metrics),
        ctx.put_bytes("per_image.parquet", buffer.getvalue()),
        *(ctx.put_bytes(f"grids/{name}.png", png_bytes(p)) for name, p in pictures.items()),
    ]
    flat = flatten_metrics(metrics)
    tracker = connect(ctx)
    try:
        tracker.log(flat, 0)
        for name, picture in pictures.items():
            tracker.image(f"evaluate/{name}", picture, 0)
    finally:
        tracker.close()
    return StageResult(files=entries, metrics=flat)


def flatten_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """Main numbers by slash path, for the manifest and the tracker."""
    flat = {}
    for model, columns in metrics["reconstruction"].items():
        for metric, interval in columns.items():
            flat[f"reconstruction/{model}/{metric}"] = float(interval["mean"])
    for pair, columns in metrics["differences"].items():
        for metric, interval in columns.items():
            flat[f"difference/{pair}/{metric}"] = float(interval["mean"])
    for name, row in metrics["generation"].items():
        for metric in ("fd", "kid", "precision", "recall", "score"):
            flat[f"generation/{name.replace('@', '-with-')}/{metric}"] = float(row[metric])
    for name, value in metrics["diagnostics"].get("angles", {}).items():
        flat[f"fusion/{name}"] = float(value)
    return flat
