"""Every path of a configuration may begin with the home folder's `~`, wherever it comes from."""

from pathlib import Path

import pytest

from drorae import recipes
from drorae.config import flatten, from_json, override, to_json
from drorae.recipes.full import FullJob

PATHS = (
    "decoder.released",
    "decoder.released_stats",
    "encoder.source",
    "evaluate.inception_weights_path",
    "shard.label_file",
    "shard.source",
    "shard.val_label_file",
    "shard.val_source",
)
NO_PATHS = ("shard.image_column", "shard.label_column", "report.title")


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")


def test_every_path_knows_the_home_folder() -> None:
    smoke = recipes.get("smoke")
    full = override(smoke, [f"{path}=~/{path}" for path in (*PATHS, *NO_PATHS)])
    flat = flatten(full)
    assert {path: flat[path] for path in PATHS} == {path: f"/somewhere/{path}" for path in PATHS}
    assert {path: flat[path] for path in NO_PATHS} == {path: f"~/{path}" for path in NO_PATHS}
    discriminators = [path for path in flat if path.endswith("discriminator.source")]
    for path in discriminators:
        assert flatten(override(smoke, [f"{path}=~/dino.pth"]))[path] == "/somewhere/dino.pth"
    assert discriminators


def test_it_is_the_same_path_from_json() -> None:
    data = to_json(recipes.get("smoke"))
    data["shard"]["source"] = "~/photos"
    assert from_json(FullJob, data).shard.source == "/somewhere/photos"


def test_addresses_and_other_users_stay() -> None:
    for source in ("s3://bucket/~/a", "asset:cifar10", "a/~", "~nobody-of-this-name/a"):
        assert override(recipes.get("smoke"), [f"shard.source={source}"]).shard.source == source
    assert Path("~").expanduser() == Path("/somewhere")
