"""What the data lack is said by `drorae plan`, and by a run before anything trains."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from PIL import Image

from drorae.data.shard_map import run_in_process
from drorae.data.sharding import run_shard
from drorae.store.context import StageContext
from drorae.store.stage_run import run_once
from drorae.store.workspace import Workspace
from pipelines import cli, stages
from pipelines.plan import Request, make_plan
from pipelines.sources import keep

SMALL = ("evaluate.num_val_images=2",)
Drorae = Callable[..., int]


def make_photos(folder: Path, classes: int, per_class: int = 6) -> Path:
    numbers = np.random.default_rng(0)
    for label in range(classes):
        place = folder / f"class{label:02d}" if classes > 1 else folder
        place.mkdir(parents=True)
        for number in range(per_class):
            pixels = numbers.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


def build_shards(workspace: Path, overrides: tuple[str, ...]) -> None:
    """What `drorae run --only shard` leaves, built in this process."""
    plan = make_plan(Request(overrides=overrides, workspace=str(workspace), only="shard"))
    store, key = Workspace(str(workspace)), plan.keys["shard"]
    ctx = StageContext(stage="shard", key=key, output_uri=store.stage_uri("shard", key))
    stage, full = stages.find_stage("shard"), plan.full
    digests = stages.source_digests(full, stage, plan.sources)
    config = stages.section_json(full, stage) | {stages.SOURCES: digests}
    fields = {"version": stage.version, "config": config, "input_keys": {}, "code_digest": ""}
    keep(plan.sources.values(), store)
    run_once(
        store,
        "shard",
        key,
        lambda: run_shard(ctx, shard=full.shard, executor=run_in_process),
        manifest_fields=fields,
    )


@pytest.fixture
def planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Exit code and error text of `drorae plan` where the shards of a source are there."""

    def plan(source: Path, *settings: str, words: tuple[str, ...] = ()) -> tuple[int, str]:
        workspace = tmp_path / "workspace"
        overrides = (f"shard.source={source}", "shard.val_fraction=0.3", *SMALL, *settings)
        build_shards(workspace, overrides)
        sets = [word for text in overrides for word in ("--set", text)]
        code = cli.main(["plan", *sets, *words, "--workspace", str(workspace)])
        return code, capsys.readouterr().err

    return plan


@pytest.mark.parametrize("classes", [9, 11, 12])
def test_a_class_count_that_is_not_the_generators_is_an_error_with_the_setting(
    tmp_path: Path, planned: Callable[..., tuple[int, str]], classes: int
) -> None:
    code, error = planned(make_photos(tmp_path / "photos", classes))
    assert code == 2
    assert f"the data has {classes} classes (class00, class01" in error
    assert "diffusion.model.num_classes=10" in error
    assert f"--set diffusion.model.num_classes={classes}" in error


def test_the_guide_is_checked_as_the_generator_is(
    tmp_path: Path, planned: Callable[..., tuple[int, str]]
) -> None:
    code, error = planned(make_photos(tmp_path / "photos", 3), "diffusion.model.num_classes=3")
    assert (code, "--set guide.model.num_classes=3" in error) == (2, True)


def test_equal_counts_are_planned(tmp_path: Path, planned: Callable[..., tuple[int, str]]) -> None:
    settings = ("diffusion.model.num_classes=3", "guide.model.num_classes=3")
    assert planned(make_photos(tmp_path / "photos", 3), *settings) == (0, "")


def test_unlabelled_data_are_one_class(
    tmp_path: Path, planned: Callable[..., tuple[int, str]]
) -> None:
    code, error = planned(make_photos(tmp_path / "photos", 1))
    assert code == 2
    assert "the data has 1 class (the source states no classes" in error
    assert "--set diffusion.model.num_classes=1" in error


def test_a_class_that_the_cap_leaves_without_an_image_is_named(
    tmp_path: Path, planned: Callable[..., tuple[int, str]]
) -> None:
    settings = (
        *("diffusion.model.num_classes=3", "guide.model.num_classes=3"),
        "shard.max_train_images=2",
    )
    code, error = planned(make_photos(tmp_path / "photos", 3), *settings)
    assert code == 2
    assert "1 of 3 classes have no training image (class0" in error
    assert "Raise shard.max_train_images=2" in error


def test_who_trains_no_generator_needs_no_classes(
    tmp_path: Path, planned: Callable[..., tuple[int, str]]
) -> None:
    photos = make_photos(tmp_path / "photos", 3)
    assert planned(photos, words=("--only", "decoder")) == (0, "")


def test_no_validation_image_is_an_error_where_a_stage_measures(
    tmp_path: Path, planned: Callable[..., tuple[int, str]]
) -> None:
    photos = make_photos(tmp_path / "photos", 10)
    code, error = planned(photos, "shard.val_fraction=0")
    assert code == 2
    assert "there is no validation image, but stage decoder measures on some" in error
    assert "Set shard.val_fraction above 0" in error


def test_generators_train_without_validation_images(
    tmp_path: Path, planned: Callable[..., tuple[int, str]]
) -> None:
    photos = make_photos(tmp_path / "photos", 10)
    words = ("--only", "shard")
    assert planned(photos, "shard.val_fraction=0", words=words) == (0, "")


def test_more_validation_images_than_there_are_is_an_error(
    tmp_path: Path, planned: Callable[..., tuple[int, str]]
) -> None:
    code, error = planned(make_photos(tmp_path / "photos", 10), "evaluate.num_val_images=400")
    assert code == 2
    assert "evaluate.num_val_images=400 of " in error
    assert "0 for all" in error


def test_a_cap_below_the_wanted_validation_images_needs_no_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--set", "shard.max_val_images=50", "--workspace", str(tmp_path)]
    assert cli.main(words) == 2
    assert "evaluate.num_val_images=400 of 50 validation images" in capsys.readouterr().err


def test_plan_counts_what_changed_in_the_source(
    tmp_path: Path,
    planned: Callable[..., tuple[int, str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    photos = make_photos(tmp_path / "photos", 10)
    assert planned(photos) == (0, "")
    (photos / "class00" / "0.png").rename(photos / "class00" / "other.png")
    (photos / "class01" / "0.png").write_bytes((photos / "class01" / "1.png").read_bytes())
    sets = [f"shard.source={photos}", "shard.val_fraction=0.3", *SMALL]
    words = [word for text in sets for word in ("--set", text)]
    assert cli.main(["plan", *words, "--workspace", str(tmp_path / "workspace")]) == 0
    said = capsys.readouterr().out
    assert "missing: source changed: 1 file added, 1 removed, 1 changed" in said


def test_a_kernel_distance_needs_two_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--set", "evaluate.kid_subset=1", "--workspace", str(tmp_path)]
    assert cli.main(words) == 2
    assert "evaluate.kid_subset=1 is out of range: expected at least 2" in capsys.readouterr().err


def test_a_class_too_many_ends_the_stage_before_it_decodes_an_image(tmp_path: Path) -> None:
    source = make_photos(tmp_path / "photos", classes=11)
    overrides = (f"shard.source={source}", "shard.val_fraction=0.3", *SMALL)
    full = make_plan(Request(overrides=overrides, workspace=str(tmp_path))).full
    ctx = StageContext(
        stage="shard",
        key="key",
        output_uri=str(tmp_path / "shard"),
        check_counts=functools.partial(stages.check_listed, full, "shard", ["diffusion"]),
    )

    def nobody(*_: object) -> NoReturn:
        pytest.fail("an image was asked for")

    with pytest.raises(ValueError, match=r"11 classes .* diffusion.model.num_classes=10"):
        run_shard(ctx, shard=full.shard, executor=nobody)


def test_a_run_of_the_shards_alone_asks_nothing_of_their_classes(tmp_path: Path) -> None:
    full = make_plan(Request(workspace=str(tmp_path), only="shard")).full
    counts = {"class_names": ["cat"], "train": {"rows": 1, "class_rows": [1]}, "val": {"rows": 0}}
    stages.check_listed(full, "shard", ["shard"], counts)


def test_a_plan_says_which_source_cannot_be_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    source = tmp_path / "nowhere"
    words = ["plan", "--recipe", "smoke", "--set", f"shard.source={source}"]
    assert cli.main([*words, "--workspace", str(tmp_path)]) == 0
    assert "shard.source cannot be seen from here; a run needs it" in capsys.readouterr().out
