"""Entry functions of the `evaluate` and `report` stages: what the stage table names.

`run_evaluate` measures reconstruction, generation and the inside of the fusion, and writes
metrics.json, per_image.parquet and grids/*.png. `run_report` arranges finished stages on one HTML
page and computes nothing new.
"""

import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from drorae.data.assets import asset_path
from drorae.data.images import ImageShards
from drorae.data.shard_map import Executor
from drorae.evaluation.features import Features, build_features
from drorae.evaluation.generation import (
    SampleSets,
    class_rows,
    draw_samples,
    measure_sets,
    photo_features,
)
from drorae.evaluation.grids import image_grid, png_bytes, to_hwc
from drorae.evaluation.inference import Tokenizer
from drorae.evaluation.inspection import Inspection, inspect_tokenizer
from drorae.evaluation.job import EvaluateJob, ReportJob
from drorae.evaluation.loading import load_generator, load_tokenizer
from drorae.evaluation.protocol import protocol
from drorae.evaluation.reconstruction import (
    Reconstructions,
    per_image_table,
    reconstruct_photos,
    summarise,
)
from drorae.evaluation.report import render
from drorae.evaluation.report_data import collect
from drorae.evaluation.sampling import WorkerInputs
from drorae.losses.perceptual import load_perceptual
from drorae.models.encoder import EncoderConfig
from drorae.shapes import Tensor
from drorae.store.context import StageContext, StageResult
from drorae.store.files import FileEntry
from drorae.tracking import connect

__all__ = ["run_evaluate", "run_report"]

MODEL_STAGES = ("decoder", "fusion", "finetune", "control", "latents", "diffusion", "guide")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """What the parts of one evaluation share."""

    ctx: StageContext
    evaluate: EvaluateJob
    encoder: EncoderConfig
    seed: int
    tokenizer: Tokenizer
    photos: ImageShards
    num_val_images: int
    features: Features
    lpips: Callable[[Tensor, Tensor], Tensor]


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
            perhaps control.
        seed: Seed of noise, untrained network, bootstrap and perturbations.
        encoder: The frozen encoder.
        evaluate: What to measure.
        executor: Who runs the sampling tasks; Ray Data unless given.
    """
    torch.set_num_threads(ctx.compute.threads_per_worker)
    run = _prepare(ctx, seed, encoder, evaluate)
    found = reconstruct_photos(
        run.tokenizer,
        run.photos,
        num_images=run.num_val_images,
        batch_images=evaluate.batch_images,
        num_examples=evaluate.num_grid_images,
        lpips=run.lpips,
        features=run.features.of,
        on_progress=lambda done: ctx.progress(
            done, run.num_val_images, "images", message="reconstructing held-out photos"
        ),
    )
    samples = _sample(run, executor)
    generation = _measure_generation(run, found, samples)
    inspection = inspect_tokenizer(
        run.tokenizer,
        load_generator(ctx.inputs, device=run.tokenizer.device),
        run.photos,
        num_images=evaluate.num_diagnostic_images,
        lpips=run.lpips,
        seed=seed,
    )
    metrics = _metrics(run, found, generation, inspection)
    pictures = _pictures(run, found, samples, inspection)
    return _write(ctx, metrics, pictures, found)


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


def _prepare(ctx: StageContext, seed: int, encoder: EncoderConfig, evaluate: EvaluateJob) -> _Run:
    device = torch.device(ctx.compute.device_type)
    photos = ImageShards(ctx.inputs["shard"], "val")
    wanted = evaluate.num_val_images or len(photos)
    if wanted > len(photos):
        raise ValueError(
            f"evaluate.num_val_images={wanted} exceeds the {len(photos)} held-out photos: use at "
            "most that many, or 0 for all."
        )
    own = evaluate.feature_extractor == "efficientnet-lite0"
    weights = asset_path("efficientnet-lite0") if own else Path(evaluate.inception_weights_path)
    features = build_features(
        evaluate.feature_extractor,
        weights,
        feature_px=evaluate.feature_px,
        batch_images=evaluate.batch_images,
        device=device,
        cache_path=Path(ctx.compute.cache_path) / "features" if ctx.compute.cache_path else None,
    )
    return _Run(
        ctx=ctx,
        evaluate=evaluate,
        encoder=encoder,
        seed=seed,
        tokenizer=load_tokenizer(ctx.inputs, device=device, encoder=encoder),
        photos=photos,
        num_val_images=wanted,
        features=features,
        lpips=load_perceptual(asset_path(f"lpips-{evaluate.lpips_net}")).to(device),
    )


def _sample(run: _Run, executor: Executor | None) -> SampleSets:
    ctx, evaluate = run.ctx, run.evaluate
    classes = int(ctx.inputs["diffusion"].read_json("config.json")["model"]["num_classes"])
    inputs = WorkerInputs(
        outputs={name: ctx.inputs[name] for name in MODEL_STAGES if name in ctx.inputs},
        encoder=run.encoder,
        evaluate=evaluate,
        seed=run.seed,
        work_uri=ctx.work_uri,
        use_gpu=ctx.compute.use_gpu,
    )
    return draw_samples(
        ctx,
        inputs,
        features=run.features.of,
        num_examples=classes * evaluate.num_grid_images,
        on_progress=lambda done, total: ctx.progress(
            done, total, "chunks", message="drawing samples"
        ),
        executor=executor,
    )


def _measure_generation(
    run: _Run, found: Reconstructions, samples: SampleSets
) -> dict[str, dict[str, Any]]:
    evaluate = run.evaluate
    train = ImageShards(run.ctx.inputs["shard"], "train")
    count = min(evaluate.num_samples, len(train))
    drawn_by = "finetune" if evaluate.decoder_for_samples == "finetune" else "fusion"
    sets = dict(samples.features)
    sets |= {f"photos/{model}": features for model, features in found.features.items()}
    sets["reconstruction"] = found.features[drawn_by].head(evaluate.num_samples)
    sets["real"] = photo_features(train, count, evaluate.batch_images, run.features.of)
    decoders = {
        name: name.partition("@")[2] or evaluate.decoder_for_samples for name in samples.features
    }
    decoders["reconstruction"] = evaluate.decoder_for_samples
    return measure_sets(
        sets,
        found.photo_features,
        kid_subset=evaluate.kid_subset,
        isc_splits=evaluate.isc_splits,
        decoders=decoders,
        on_progress=lambda done: run.ctx.progress(
            done, len(sets), "sets", message="measuring distances"
        ),
    )


def _metrics(
    run: _Run,
    found: Reconstructions,
    generation: dict[str, dict[str, Any]],
    inspection: Inspection,
) -> dict[str, Any]:
    evaluate = run.evaluate
    means, differences = summarise(found, replicates=evaluate.bootstrap_replicates, seed=run.seed)
    reconstruction: dict[str, dict[str, Any]] = {
        model: {metric: interval.as_dict() for metric, interval in columns.items()}
        for model, columns in means.items()
    }
    for model, columns in reconstruction.items():
        columns["fd"] = {"mean": generation.pop(f"photos/{model}")["fd"], "lo": None, "hi": None}
    return {
        "reconstruction": reconstruction,
        "differences": {
            pair: {metric: interval.as_dict() for metric, interval in columns.items()}
            for pair, columns in differences.items()
        },
        "generation": generation,
        "diagnostics": inspection.report,
        "meta": protocol(
            evaluate,
            run.encoder,
            seed=run.seed,
            num_val_images=run.num_val_images,
            feature_identity=run.features.identity,
            input_keys={name: output.key for name, output in run.ctx.inputs.items()},
        ),
    }


def _pictures(
    run: _Run, found: Reconstructions, samples: SampleSets, inspection: Inspection
) -> dict[str, np.ndarray]:
    evaluate = run.evaluate
    names = list(found.examples)
    pictures = {
        "reconstruction": image_grid(
            [to_hwc(found.examples[name]) for name in names], row_labels=names
        )
    }
    class_names = run.ctx.inputs["shard"].read_json("counts.json")["class_names"]
    config = run.ctx.inputs["diffusion"].read_json("config.json")["model"]
    classes = int(config["num_classes"])
    shown = range(min(evaluate.num_grid_classes, classes))
    for name, images in samples.examples.items():
        if "@" not in name:
            rows = class_rows(to_hwc(images), classes, shown, evaluate.num_grid_images)
            labels = [str(class_names[i]) if i < len(class_names) else str(i) for i in shown]
            pictures[f"samples-{name}"] = image_grid(rows, row_labels=labels)
    if inspection.routing is not None:
        pictures["routing"] = inspection.routing
    return pictures


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
