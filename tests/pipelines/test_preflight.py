import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from drorae import recipes
from pipelines import cli
from pipelines.plan import Request, RunPlan, make_plan
from pipelines.preflight import check_machine


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def _no_assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRORAE_ASSETS", str(tmp_path / "assets"))
    monkeypatch.delenv("DRORAE_RAY_ADDRESS", raising=False)


def planned(root: Path, source: str, only: str | None = None) -> RunPlan:
    assert "smoke" in recipes.names()
    overrides = (f"shard.source={source}", "shard.val_fraction=0.2")
    workspace = str(root / "workspace")
    return make_plan(Request(overrides=overrides, workspace=workspace, only=only))


def test_a_missing_source_is_told_before_services_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = tmp_path / "workspace"
    arguments = ["run", "--set", f"shard.source={tmp_path}/gone", "--only", "shard"]
    assert cli.main([*arguments, "--workspace", str(workspace)]) == 2
    assert "gone' does not exist: expected a folder" in capsys.readouterr().err
    assert not (workspace / "prefect").exists()


def test_the_asset_of_a_late_stage_is_asked_for_first(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Run: drorae assets fetch smoke"):
        check_machine(planned(tmp_path, str(photos)), tmp_path)


def test_only_stages_that_run_are_asked_about(tmp_path: Path, photos: Path) -> None:
    check_machine(planned(tmp_path, str(photos), only="shard"), tmp_path)


def test_every_asset_of_the_recipe_is_asked_for(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("drorae.data.readers.source.check_source", asked.append)
    check_machine(planned(tmp_path, str(photos)), tmp_path)
    names = ("dinov2-s-saliency", "efficientnet-lite0", "lpips-alex")
    assert asked == [str(photos), *(f"asset:{name}" for name in names)]


def test_a_missing_file_of_weights_is_told_before_services_start(
    tmp_path: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("drorae.data.readers.source.check_source", lambda source: None)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    settings = ("feature_extractor=inception-v3", "inception_weights_path=~/inception.pth")
    words = ["run", "--set", f"shard.source={photos}"]
    words += [word for text in settings for word in ("--set", f"evaluate.{text}")]
    assert cli.main([*words, "--workspace", str(tmp_path / "workspace")]) == 2
    error = capsys.readouterr().err
    assert f"evaluate.inception_weights_path='{tmp_path}/home/inception.pth' does not" in error
    assert "but stage evaluate reads it" in error


def test_a_missing_label_file_is_told_before_services_start(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "--set", f"shard.source={photos}", "--set", f"shard.label_file={tmp_path}/no"]
    workspace = str(tmp_path / "workspace")
    assert cli.main([*words, "--only", "shard", "--workspace", workspace]) == 2
    assert "no' does not exist, but stage shard reads it: expected a file of labels" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["label_file", "val_label_file"])
def test_other_labels_at_the_same_path_give_another_key(
    tmp_path: Path, photos: Path, name: str
) -> None:
    labels = tmp_path / "labels.txt"
    overrides = (f"shard.source={photos}", f"shard.{name}={labels}")
    request = Request(overrides=overrides, workspace=str(tmp_path / "workspace"))
    keys = []
    for content in ("1.png 0", "1.png 1"):
        labels.write_text(content)
        keys.append(make_plan(request).keys["shard"])
    assert keys[0] != keys[1]


def test_other_weights_at_the_same_path_give_another_key(tmp_path: Path, photos: Path) -> None:
    weights = tmp_path / "inception.pth"
    overrides = (
        f"shard.source={photos}",
        "evaluate.feature_extractor=inception-v3",
        f"evaluate.inception_weights_path={weights}",
    )
    request = Request(overrides=overrides, workspace=str(tmp_path / "workspace"))
    keys = []
    for content in ("first", "second"):
        weights.write_text(content)
        keys.append(make_plan(request).keys)
    assert keys[0]["evaluate"] != keys[1]["evaluate"]
    assert keys[0]["finetune"] == keys[1]["finetune"]


def test_a_folder_may_be_called_by_a_number_or_from_the_home_folder(
    tmp_path: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos.rename(tmp_path / "2012")
    (tmp_path / "2012" / "0.png").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = []
    for source in ("2012", "~/2012", str(tmp_path / "2012")):
        words = ["plan", "--json", "--set", f"shard.source={source}", "--only", "shard"]
        assert cli.main([*words, "--workspace", "~/workspace"]) == 0
        found.append(json.loads(capsys.readouterr().out)["stages"][0]["key"])
    assert len(set(found)) == 1


def test_without_a_perceptual_loss_its_network_is_not_needed(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("drorae.data.readers.source.check_source", asked.append)
    plan = planned(tmp_path, str(photos))
    steps = tuple(
        dataclasses.replace(step, selected=step.stage == "decoder") for step in plan.steps
    )
    full = dataclasses.replace(
        plan.full,
        decoder=dataclasses.replace(
            plan.full.decoder,
            train=dataclasses.replace(plan.full.decoder.train, lpips_weight=0.0),
        ),
    )
    check_machine(dataclasses.replace(plan, full=full, steps=steps), tmp_path)
    assert "asset:lpips-alex" not in asked


def test_a_cluster_has_assets_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRORAE_RAY_ADDRESS", "http://head:8265")
    check_machine(planned(tmp_path, str(tmp_path / "gone")), tmp_path)


def test_a_full_disk_is_told_before_services_start(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(RuntimeError, match=r"no space left for .*: 1\.0 MB free, expected"):
        check_machine(planned(tmp_path, str(photos), only="shard"), tmp_path)
