import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import children

SLEEPER = (
    "from pipelines import children; import subprocess, sys, time; children.end_with_parent();"
    "print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def wait_for(condition: object, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_stop_ends_the_whole_group(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = children.spawn([sys.executable, "-c", SLEEPER], log_path=log, env={})
    wait_for(lambda: log.read_text().strip())
    children.stop(process, grace_s=5.0)
    assert process.returncode == -signal.SIGTERM
    wait_for(lambda: not is_alive(int(log.read_text())))


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True);"
    command = [sys.executable, "-c", f"{code} time.sleep(60)"]
    process = children.spawn(command, log_path=tmp_path / "log", env={})
    wait_for(lambda: (tmp_path / "log").read_text())
    children.stop(process, grace_s=0.2)
    assert process.returncode == -signal.SIGKILL


def test_children_end_when_the_parent_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    parent_code = (
        "from pathlib import Path; from pipelines import children; import sys, time;"
        f"command = [sys.executable, '-c', {SLEEPER!r}];"
        f"children.spawn(command, log_path=Path({str(log)!r}), env={{}});"
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", parent_code])
    wait_for(lambda: log.exists() and log.read_text().strip())
    parent.kill()
    parent.wait()
    wait_for(lambda: not is_alive(int(log.read_text())))


def test_any_module_can_be_run_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines.children", "platform"]
    process = children.spawn(command, log_path=tmp_path / "log", env={})
    assert process.wait(60) == 0
    assert (tmp_path / "log").read_text().strip()
    children.stop(process, grace_s=1.0)


def test_a_process_that_we_did_not_spawn_watches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(children.LIFELINE_VARIABLE, raising=False)
    children.end_with_parent()
    assert os.getpid()
