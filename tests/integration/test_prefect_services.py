"""`make up`, a deployment from a bare shell, `make down`: nothing is left."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
STATE = REPOSITORY / ".drorae" / "services"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    left_out = ("PREFECT_", "DRORAE_", "COVERAGE_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    tests = REPOSITORY / "tests"
    paths = [tests / "integration" / "fake_site", REPOSITORY, tests / "pipelines"]
    return kept | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "FAKE_JOURNAL": str(tmp_path / "journal.jsonl"),
    }


def services(command: str, environment: dict[str, str]) -> str:
    answer = subprocess.run(
        [sys.executable, str(REPOSITORY / "infra" / "local" / "services.py"), command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def deployment_run(name: str, *parameters: str) -> subprocess.CompletedProcess:
    """Run a deployment from a shell without our variables, in the folder of the repository."""
    bare = {"HOME": os.environ["HOME"], "PATH": f"{BIN}:/usr/bin:/bin"}
    return subprocess.run(
        ["prefect", "deployment", "run", name, *parameters, "--watch"],
        env=bare,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def test_up_run_down(tmp_path: Path, environment: dict[str, str]) -> None:
    if (STATE / "pids.json").exists():
        pytest.skip("services are up in this folder; `make down` first")
    common = ["--param", "recipe=fake", "--param", f"workspace={tmp_path / 'workspace'}"]
    try:
        out = services("up", environment)
        assert "deployment run drorae/full" in out
        state = json.loads((STATE / "pids.json").read_text())
        assert services("up", environment) == out
        assert "down" not in services("status", environment)
        full = deployment_run("drorae/full", *common)
        assert full.returncode == 0, full.stdout + full.stderr
        overrides = """overrides=["c.text=\\"new\\""]"""
        one = deployment_run("drorae/c", *common, "--param", overrides)
        assert one.returncode == 0, one.stdout + one.stderr
        bad = deployment_run("drorae/c", *common, "--param", 'overrides=["c.txt=1"]')
        assert bad.returncode != 0
        lines = (tmp_path / "journal.jsonl").read_text().splitlines()
        done = [e["stage"] for e in map(json.loads, lines) if e["event"] == "done"]
        assert sorted(done) == ["a", "b", "c", "c", "d", "report"]
        manifest = next((tmp_path / "workspace" / "stages" / "c").glob("*/manifest.json"))
        assert set(json.loads(manifest.read_text())["run_ids"]) == {"prefect", "mlflow", "ray"}
    finally:
        services("down", environment)
    assert not (REPOSITORY / "prefect.toml").exists()
    assert not Path(state["ray_folder"]).exists()
    for port in state["ports"].values():
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    deadline = time.monotonic() + 10  # until init has collected them
    while any(Path(f"/proc/{entry['pid']}").exists() for entry in state["processes"].values()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
