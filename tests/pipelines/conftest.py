"""The fake graph, here and in every process that a test starts, and one Prefect server."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_graph import stages as fake

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace for the fake graph, without MLflow."""
    from drorae import recipes

    paths = os.pathsep.join([str(REPOSITORY), str(HERE), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", paths)
    monkeypatch.setenv("FAKE_JOURNAL", str(tmp_path / "journal.jsonl"))
    monkeypatch.setenv("DRORAE_TRACKING_URI", "none")
    monkeypatch.delenv("DRORAE_RAY_ADDRESS", raising=False)
    monkeypatch.setattr("pipelines.stages.STAGES", fake.TABLE)
    monkeypatch.setattr(recipes, "get", fake.fake_get)
    monkeypatch.setattr(recipes, "names", lambda: ["fake"])
    monkeypatch.setattr(recipes, "describe", lambda name: "A fake recipe.\n\nMore.")
    return tmp_path / "workspace"


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """A real Prefect server for all tests of the session."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from prefect.settings import PREFECT_API_URL
        from prefect.testing.utilities import prefect_test_harness

        with prefect_test_harness(server_startup_timeout=180):
            yield PREFECT_API_URL.value()


@pytest.fixture
def prefect(prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of that server, configured as a user would."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    return prefect_server
