"""`drorae run` as a program, with its own Prefect server: killed, continued, run twice at once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
SLOW = ("--set", "c.sleep_s=8", "--set", "d.sleep_s=8")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_API", "DRORAE_"))}
    paths = [REPOSITORY, REPOSITORY / "tests" / "pipelines"]
    return kept | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "FAKE_JOURNAL": str(tmp_path / "journal.jsonl"),
        "PREFECT_HOME": str(tmp_path / "home"),
        "COLUMNS": "200",
    }


def start(tmp_path: Path, environment: dict[str, str], *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "fake_graph", "run", "--recipe", "fake"]
    return subprocess.Popen(
        [*command, "--workspace", str(tmp_path / "workspace"), *options],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def events(tmp_path: Path) -> list[dict]:
    path = tmp_path / "journal.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def built(tmp_path: Path) -> list[str]:
    return [event["stage"] for event in events(tmp_path) if event["event"] == "done"]


def wait_for_checkpoint(tmp_path: Path, stage: str) -> None:
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob(f"workspace/stages/{stage}/*/_work/checkpoint")):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def leftovers(tmp_path: Path) -> list[str]:
    """Command lines of processes that still work in the folder of the test."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(tmp_path) in text:
            found.append(text)
    return found


def test_after_sigkill_nothing_is_left_and_the_stage_continues(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    first = start(tmp_path, environment, *SLOW)
    wait_for_checkpoint(tmp_path, "c")
    first.kill()
    first.communicate()
    deadline = time.monotonic() + 30
    while leftovers(tmp_path):
        assert time.monotonic() < deadline, leftovers(tmp_path)
        time.sleep(0.2)
    second = start(tmp_path, environment, *SLOW)
    out, _ = second.communicate()
    assert second.returncode == 0, out
    assert sorted(built(tmp_path)) == ["a", "b", "c", "d", "report"]
    resumes = [e["step"] for e in events(tmp_path) if (e["stage"], e["event"]) == ("c", "resume")]
    assert resumes[0] == 0
    assert resumes[1] > 0
    assert "c: unfinished: an earlier attempt did not finish; it is continued" in out


def test_two_runs_at_once_build_each_stage_once(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    runs = [start(tmp_path, environment, *SLOW) for _ in range(2)]
    outs = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outs
    assert sorted(built(tmp_path)) == ["a", "b", "c", "d", "report"]


def test_ctrl_c_ends_cleanly(tmp_path: Path, environment: dict[str, str]) -> None:
    run = start(tmp_path, environment, *SLOW)
    wait_for_checkpoint(tmp_path, "c")
    run.send_signal(signal.SIGINT)
    out, _ = run.communicate(timeout=120)
    assert run.returncode == 130, out
    assert "interrupted; the same command continues" in out
    assert "Traceback" not in out
    assert not leftovers(tmp_path)


def test_a_configured_server_that_is_down_does_not_matter(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "prefect.toml").write_text('[api]\nurl = "http://127.0.0.1:1/api"\n')
    run = start(tmp_path, environment)
    out, _ = run.communicate()
    assert run.returncode == 0, out
    assert "does not answer; this run uses one of its own" in out
    assert (tmp_path / "workspace" / "mlflow" / "mlflow.db").exists()
