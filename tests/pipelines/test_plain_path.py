"""Workspaces whose path means something else in a URL."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from drorae.store.workspace import Workspace
from drorae.tracking import finish_run, open_run
from pipelines.plain_path import plain_path
from pipelines.runs import tracking_uri

ODD = ["a?b=c", "100%", "a%41", "#1", "two words", "größe", 'it\'s "so"', "a&b;c"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRORAE_CACHE", str(tmp_path / "cache"))
    for name in ("DRORAE_TRACKING_URI", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def test_a_plain_folder_is_itself(tmp_path: Path) -> None:
    assert plain_path(tmp_path / "runs-1.0") == tmp_path / "runs-1.0"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ODD)
def test_any_other_is_reached_by_a_plain_link(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    link = plain_path(folder)
    assert link.resolve() == folder.resolve()
    assert plain_path(folder) == link
    assert not set(str(link)) & set("?%# '\"&;ö")


def test_without_any_plain_folder_the_error_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRORAE_CACHE", str(tmp_path / "100%"))
    with pytest.raises(ValueError, match="Set DRORAE_CACHE"):
        plain_path(tmp_path / "a?b")


def test_curves_lie_in_the_workspace_and_nothing_beside_it(tmp_path: Path) -> None:
    root = tmp_path / "place" / "".join(ODD)
    root.mkdir(parents=True)
    uri = tracking_uri(root, is_shared=False)
    assert uri is not None
    run_id = open_run(uri, "drorae", run_key="k", name="n", parent_run_id=None, params={}, tags={})
    finish_run(uri, run_id, "FINISHED")
    assert (root / "mlflow" / "mlflow.db").is_file()
    assert os.listdir(root.parent) == [root.name]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_with_its_servers_fits_into_such_a_workspace(workspace: Path, tmp_path: Path) -> None:
    root = tmp_path / "place" / "".join(ODD)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_API")}
    env = env | {"PREFECT_HOME": str(tmp_path / "prefect"), "DRORAE_TRACKING_URI": ""}
    command = [sys.executable, "-m", "fake_graph", "run", "--recipe", "fake"]
    for said in ("built", "reused"):
        done = subprocess.run(
            [*command, "--workspace", str(root)],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count(said) >= 5
    assert list(root.glob("prefect/*/prefect.db"))
    assert (root / "mlflow" / "mlflow.db").is_file()
    assert os.listdir(root.parent) == [root.name]


@pytest.mark.parametrize("uri", ["s3://bucket/a?versionId=b", "s3://bucket/a//b", "s3://bucket//a"])
def test_an_address_that_s3_clients_read_differently_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="versionId= or //"):
        Workspace(uri)
