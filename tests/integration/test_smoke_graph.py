"""The smoke recipe with few images and steps, through the real command, Prefect, Ray and MLflow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from drorae.data.assets import ASSET_SETS, asset_path

FEW = {
    "shard.max_train_images": 64,
    "shard.max_val_images": 40,
    "shard.rows_per_shard": 40,
    "decoder.num_steps": 6,
    "decoder.train.batch_images": 8,
    "fusion.num_steps": 4,
    "fusion.train.batch_images": 8,
    "fusion.expert_hidden": 16,
    "finetune.num_steps": 4,
    "finetune.train.batch_images": 8,
    "diffusion.num_steps": 4,
    "diffusion.batch_images": 8,
    "guide.num_steps": 3,
    "guide.batch_images": 8,
    "evaluate.num_val_images": 40,
    "evaluate.num_samples": 20,
    "evaluate.chunk_samples": 10,
    "evaluate.num_grid_points": 3,
    "evaluate.kid_subset": 10,
    "evaluate.isc_splits": 2,
    "evaluate.bootstrap_replicates": 100,
    "evaluate.num_diagnostic_images": 8,
    "compute.log_every_steps": 1,
    "compute.save_every_steps": 2,
}
STAGES = [
    *("shard", "decoder", "fusion", "finetune", "control"),
    *("latents", "diffusion", "guide", "evaluate", "report"),
]


def drorae(workspace: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # Lines are counted in shorter tests; here it would slow some fifty processes by a quarter.
    left_out = ("PREFECT_API", "RAY_ADDRESS", "COVERAGE_PROCESS")
    env = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    command = [sys.executable, "-m", "pipelines.cli", *words, "--workspace", str(workspace)]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=1500, check=False
    )


def settings() -> list[str]:
    return [word for path, value in FEW.items() for word in ("--set", f"{path}={value}")]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ASSET_SETS["smoke"]:
        asset_path(name)  # says how to fetch what is missing
    folder = tmp_path_factory.mktemp("workspace")
    done = drorae(folder, "run", "--recipe", "smoke", *settings())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "report.html" in done.stdout
    return folder


def manifests(workspace: Path) -> dict[str, dict]:
    found = sorted(workspace.glob("stages/*/*/manifest.json"))
    return {path.parents[1].name: json.loads(path.read_text()) for path in found}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_stage_commits_an_output_with_its_provenance(workspace: Path) -> None:
    found = manifests(workspace)
    assert sorted(found) == sorted(STAGES)
    for manifest in found.values():
        assert all(len(entry["sha256"]) == 64 for entry in manifest["files"])
        assert manifest["code_digest"]
        assert manifest["wall_s"] > 0
    assert found["fusion"]["input_keys"].keys() == {"shard", "decoder"}
    assert found["diffusion"]["run_ids"]["mlflow"]
    assert found["shard"]["metrics"]
    report = next(workspace.glob("stages/report/*/report.html")).read_text()
    assert "<html" in report
    assert "http" not in report.split("<body")[0].replace("http://www.w3.org", "")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_same_command_again_reuses_every_stage(workspace: Path) -> None:
    again = drorae(workspace, "run", "--recipe", "smoke", *settings())
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("reused") >= len(STAGES)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_change_of_the_fusion_leaves_what_does_not_depend_on_it(workspace: Path) -> None:
    changed = [*settings(), "--set", "fusion.expert_hidden=12", "--json"]
    plan = drorae(workspace, "plan", "--recipe", "smoke", *changed)
    assert plan.returncode == 0, plan.stderr
    found = json.loads(plan.stdout)
    reused = {row["stage"] for row in found["stages"] if row["state"] == "present"}
    assert reused == {"shard", "decoder", "control"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_mlflow_has_one_parent_and_a_run_a_stage_with_steps_and_images(workspace: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{workspace / 'mlflow' / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    nested = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(runs) - len(nested) == 1
    assert len(nested) == len(STAGES)
    decoder = next(run for run in nested if run.info.run_id == run_id(workspace, "decoder"))
    history = client.get_metric_history(decoder.info.run_id, "train/loss")
    assert [point.step for point in history] == [1, 2, 3, 4, 5, 6]
    assert decoder.data.params["decoder.train.num_steps"] == "6"


def run_id(workspace: Path, stage: str) -> str:
    return manifests(workspace)[stage]["run_ids"]["mlflow"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_photos_and_classes_become_pictures(workspace: Path, tmp_path: Path) -> None:
    from PIL import Image

    photo = tmp_path / "photo.png"
    Image.effect_mandelbrot((48, 40), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(photo)
    common = ["--recipe", "smoke", *settings()]
    picture = tmp_path / "side.png"
    done = drorae(workspace, "reconstruct", str(photo), *common, "--out", str(picture))
    assert done.returncode == 0, done.stderr
    with Image.open(picture) as side_by_side:
        assert side_by_side.width > side_by_side.height
    samples = tmp_path / "samples.png"
    done = drorae(workspace, "sample", "--class", "3", *common, "--out", str(samples))
    assert done.returncode == 0, done.stderr
    with Image.open(samples) as generated:
        assert generated.width >= 32


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_flipped_byte_is_named(workspace: Path) -> None:
    path = next(workspace.glob("stages/fusion/*/fusion.safetensors"))
    good = path.read_bytes()
    try:
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        status = drorae(workspace, "status", "--verify")
        assert status.returncode == 1
        assert "fusion.safetensors" in status.stdout + status.stderr
    finally:
        path.write_bytes(good)
