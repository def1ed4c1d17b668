import dataclasses
import io
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from evaluation_fakes import GRID, WIDTH, build_tiny_features, commit, output_of, write_module
from PIL import Image

from drorae.config import Compute, Resources, from_json, to_json
from drorae.data.shard_map import BuildWorker, Executor, ShardTask, run_in_process
from drorae.evaluation import workers
from drorae.evaluation.job import EvaluateJob, ReportJob
from drorae.evaluation.report import render
from drorae.evaluation.report_data import collect
from drorae.evaluation.stages import run_evaluate, run_report
from drorae.models.dit import DiT, DiTConfig
from drorae.models.encoder import EncoderConfig
from drorae.store import files
from drorae.store.context import StageContext, StageResult

JOB = EvaluateJob(
    num_val_images=0,
    num_samples=7,
    num_grid_points=3,
    feature_px=32,
    kid_subset=4,
    isc_splits=2,
    batch_images=4,
    chunk_samples=3,
    chunk_photos=4,
    bootstrap_replicates=100,
    lpips_net="alex",
    num_grid_images=2,
    num_diagnostic_images=5,
)


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, assets: Path, encoder_config: EncoderConfig):
    monkeypatch.setattr(workers, "build_features", build_tiny_features)
    monkeypatch.setattr(workers, "asset_path", lambda name: assets / f"{name}.safetensors")

    def run(
        ctx: StageContext, job: EvaluateJob = JOB, executor: Executor = run_in_process
    ) -> StageResult:
        return run_evaluate(ctx, seed=3, encoder=encoder_config, evaluate=job, executor=executor)

    return run


def read_metrics(ctx: StageContext) -> dict:  # type: ignore[type-arg]
    return json.loads(Path(ctx.output_uri, "metrics.json").read_text())


def test_all_models_sets_and_files_are_there(evaluate, context: StageContext) -> None:
    result = evaluate(context)
    found = read_metrics(context)
    assert set(found["reconstruction"]) == {"rae", "fusion", "finetune", "control"}
    assert set(found["differences"]) >= {"fusion-rae", "finetune-control"}
    assert set(found["generation"]) == {
        "unguided",
        "unguided@decoder",
        "cfg",
        "autoguidance",
        "autoguidance@decoder",
        "untrained",
        "reconstruction",
        "real",
    }
    assert found["generation"]["unguided@decoder"]["decoder"] == "decoder"
    assert found["generation"]["unguided"]["num_images"] == 7
    assert found["meta"]["num_val_images"] == 10
    assert len(found["meta"]["feature_identity"].split(":")[-1]) == 64
    names = {entry.name for entry in result.files}
    assert {
        "metrics.json",
        "per_image.parquet",
        "grids/reconstruction.png",
        "grids/routing.png",
    } <= names
    assert "grids/samples-cfg.png" in names
    assert (
        result.metrics["reconstruction/rae/psnr"] == found["reconstruction"]["rae"]["psnr"]["mean"]
    )
    assert all(np.isfinite(v) for v in result.metrics.values())


def test_reconstructions_of_all_photos_get_the_frechet_distance_alone_and_none_twice(
    evaluate, context: StageContext
) -> None:
    evaluate(context)
    first = read_metrics(context)
    done = Path(context.work_uri, "done")
    models = {"rae", "fusion", "finetune", "control"}
    small = {path.stem for path in done.glob("measure-photos-*")}
    assert small == {f"measure-photos-{model}" for model in models}
    for name in small:
        assert "fd" in (text := (done / f"{name}.json").read_text())
        assert "kid" not in text
    for path in done.glob("measure-*"):
        path.unlink()
    evaluate(context, dataclasses.replace(JOB, num_val_images=7))
    found = read_metrics(context)
    assert "measure-photos-finetune" not in {path.stem for path in done.iterdir()}
    assert (
        found["reconstruction"]["finetune"]["fd"]["mean"]
        == found["generation"]["reconstruction"]["fd"]
    )
    for part in ("reconstruction", "generation"):
        assert list(found[part]) == list(first[part])
        for name, row in first[part].items():
            assert list(found[part][name]) == list(row)


def test_means_are_those_of_the_per_image_table(evaluate, context: StageContext) -> None:
    evaluate(context)
    table = pq.read_table(Path(context.output_uri, "per_image.parquet")).to_pandas()
    assert len(table) == 4 * 10
    means = table.groupby("model")["psnr"].mean()
    found = read_metrics(context)
    for model, values in found["reconstruction"].items():
        assert values["psnr"]["mean"] == pytest.approx(means[model], abs=1e-4)
    paired = found["differences"]["fusion-rae"]["psnr"]["mean"]
    assert paired == pytest.approx(means["fusion"] - means["rae"], abs=1e-4)


def test_numbers_do_not_depend_on_batch_or_chunk_size(
    evaluate, context: StageContext, tmp_path: Path
) -> None:
    first = evaluate(context)
    other = dataclasses.replace(context, output_uri=str(tmp_path / "other"), work_uri="")
    second = evaluate(
        other, dataclasses.replace(JOB, batch_images=2, chunk_samples=5, chunk_photos=7)
    )
    for name, value in first.metrics.items():
        # Float sums of another batch shape may flip a truncated byte here and there.
        assert second.metrics[name] == pytest.approx(value, rel=0.02, abs=1e-3), name


class Pool:
    """So many actors in one process; a task goes to any of them, and they end in any order."""

    def __init__(self, num_actors: int) -> None:
        self.num_actors = num_actors
        self.random = random.Random(num_actors)

    def __call__(
        self, tasks: Sequence[ShardTask], build: BuildWorker, compute: Compute, worker: Resources
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        actors = [build() for _ in range(self.num_actors)]
        for task in self.random.sample(tasks, len(tasks)):
            yield task.name, self.random.choice(actors)(task)


def test_numbers_of_one_two_and_four_actors_are_the_same_bit_for_bit(
    evaluate, context: StageContext, tmp_path: Path
) -> None:
    found = []
    for num_actors in (1, 2, 4):
        uri = str(tmp_path / f"{num_actors} actors")
        compute = dataclasses.replace(context.compute, cache_path=f"{uri} cache")
        ctx = dataclasses.replace(context, output_uri=uri, work_uri="", compute=compute)
        result = evaluate(ctx, executor=Pool(num_actors))
        found.append({entry.name: entry.sha256 for entry in result.files})
    assert found[0] == found[1] == found[2]


def test_only_what_is_missing_is_done_again(evaluate, context: StageContext) -> None:
    first = evaluate(context)
    names = {path.stem for path in Path(context.work_uri, "done").iterdir()}
    photos = {"reconstruct-00000000", "reconstruct-00000004", "reconstruct-00000008"}
    assert photos <= names
    files.delete(files.join(context.work_uri, "done", "unguided-00000003.json"))
    files.delete(files.join(context.work_uri, "done", "reconstruct-00000004.json"))
    before = written_at(context)
    second = evaluate(context)
    assert second.metrics == first.metrics
    after = written_at(context)
    changed = {name for name in after if after[name] != before[name]}
    assert {Path(name).name for name in changed} == {"00000003.npz", "00000004.npz"}


def written_at(ctx: StageContext) -> dict[str, int]:
    found = Path(ctx.work_uri).rglob("*.npz")
    return {str(path): path.stat().st_mtime_ns for path in found}


def test_a_failed_task_leaves_what_was_done(
    evaluate, context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(workers, "inspect_tokenizer", fail)
        with pytest.raises(RuntimeError, match="no inspection"):
            evaluate(context)
    before = written_at(context)
    assert before
    evaluate(context)
    after = written_at(context)
    assert {name: after[name] for name in before} == before


def fail(*args: object, **settings: object) -> None:
    raise RuntimeError("no inspection today")


def test_no_task_leaves_more_pictures_than_are_shown(evaluate, context: StageContext) -> None:
    evaluate(context, dataclasses.replace(JOB, num_grid_classes=2))
    held = {"unguided": 0, "cfg": 0, "autoguidance": 0, "untrained": 0}
    for guidance in held:
        for path in Path(context.work_uri, "values", guidance).iterdir():
            with np.load(path) as data:
                held[guidance] += len(data["images"])
    assert set(held.values()) == {4}  # two of each of two classes


def test_training_photos_are_read_once_for_all_runs(
    evaluate, context: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(context)
    other = dataclasses.replace(context, output_uri=str(tmp_path / "other"), work_uri="")
    read = workers.ImageShards.read

    def only_held_out(self, ids):
        assert self.split == "val"
        return read(self, ids)

    monkeypatch.setattr(workers.ImageShards, "read", only_held_out)
    assert evaluate(other).metrics == first.metrics


def test_without_control_guide_is_used_and_control_left_out(
    evaluate, context: StageContext
) -> None:
    context.inputs.pop("control")
    evaluate(context, dataclasses.replace(JOB, num_val_images=6, decoder_for_samples="decoder"))
    found = read_metrics(context)
    assert "control" not in found["reconstruction"]
    assert "finetune-control" not in found["differences"]
    assert "unguided@finetune" in found["generation"]


def test_a_recipe_without_autoguidance_measures_its_base_head_instead(
    evaluate, context: StageContext, tmp_path: Path
) -> None:
    config = DiTConfig(
        input_size=GRID,
        in_channels=WIDTH,
        hidden_size=16,
        depth=2,
        num_heads=2,
        num_classes=3,
        base_head_after=1,
    )
    settings = {"model": to_json(config), "prediction": "clean"}
    context.inputs["diffusion"] = commit(
        tmp_path, "diffusion", write_module("dit", DiT(config), settings)
    )
    context.inputs.pop("guide")
    ways = ("unguided", "internal")
    result = evaluate(context, dataclasses.replace(JOB, guidances=ways, sampler="sde"))
    found = read_metrics(context)
    sets = {"unguided", "unguided@decoder", "internal", "reconstruction", "real"}
    assert set(found["generation"]) == sets
    assert found["meta"]["internal_scale"] == 1.78
    inputs = {**context.inputs, "evaluate": output_of(context, result)}
    page = render(collect(inputs, recipe="r", max_points=9), ReportJob())
    assert "Internal guidance" in page
    assert "generation/internal/fd" in result.metrics


def test_more_photos_than_there_are_is_an_error(evaluate, context: StageContext) -> None:
    with pytest.raises(ValueError, match="exceeds the 10 held-out photos"):
        evaluate(context, dataclasses.replace(JOB, num_val_images=11))


def test_report_is_made_from_finished_stages(
    evaluate, context: StageContext, tmp_path: Path
) -> None:
    evaluation = output_of(context, evaluate(context))
    report = StageContext(
        stage="report",
        key="report-key",
        output_uri=str(tmp_path / "report"),
        inputs={**context.inputs, "evaluate": evaluation},
    )
    result = run_report(report, recipe="tiny", report=ReportJob(title="Tiny"))
    page = Path(report.output_uri, "report.html").read_text()
    assert result.files[0].name == "report.html"
    assert "9 training and 10 held-out photos" in page
    assert "Classifier-free guidance" in page
    assert 'id="curves-diffusion-' in page


def test_grids_are_pictures(evaluate, context: StageContext) -> None:
    evaluate(context)
    data = Path(context.output_uri, "grids", "samples-unguided.png").read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        assert image.height == 3 * 66 - 2  # one row per class


@pytest.mark.parametrize(
    "change",
    [
        {"num_samples": 0},
        {"chunk_photos": 0},
        {"num_grid_points": 1},
        {"guidance_interval": (0.5, 0.5)},
        {"feature_extractor": "inception-v3"},
        {"bootstrap_replicates": 5},
        {"cfg_scale": 0.5},
        {"num_val_images": -1},
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"evaluate\."):
        dataclasses.replace(JOB, **change)  # type: ignore[arg-type]


def test_settings_survive_json() -> None:
    assert from_json(EvaluateJob, to_json(JOB)) == JOB
