"""Starting a stage job and following it to its end.

`LocalLauncher` runs the job as a process of this machine, with one local Ray for all jobs of the
run; `launch_ray.RayJobLauncher` submits the same program to a cluster. Both number the attempts,
follow the job's progress file, and take its outcome from the attempt folder.
"""

import json
import logging
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from drorae.failure import Failure
from drorae.store import files
from drorae.store.context import PROGRESS_NAME
from drorae.store.patience import patience
from drorae.store.workspace import WORK_NAME, Workspace
from pipelines import attempt as attempts
from pipelines import children
from pipelines.attempt import JobResult, JobSpec
from pipelines.job import RAY_ADDRESS_PATH_VARIABLE
from pipelines.ray_head import RayHead

POLL_S = 0.2
PROGRESS_EVERY_S = 1.0
GRACE_S = 20.0
FULL_DISK_BYTES = 8 << 20

OnProgress = Callable[[dict[str, Any]], None]

log = logging.getLogger(__name__)


class StageFailed(RuntimeError):
    """A stage job ended badly.

    Args:
        error: What the job said.
        log_path: Where its trace is.
    """

    def __init__(self, error: Failure, log_path: str):
        super().__init__(error, log_path)
        self.error = error
        self.log_path = log_path

    def __str__(self) -> str:
        return f"stage {self.error.stage} failed: {self.error.message} (log: {self.log_path})"


class Stopped(RuntimeError):
    """The run was asked to end while a stage job was under way."""


class Launcher(Protocol):
    """Runs stage jobs."""

    def run(self, spec: JobSpec, *, uses_ray: bool, on_progress: OnProgress) -> JobResult:
        """Run a job to its end.

        Raises:
            StageFailed: If it ends badly.
            Stopped: If the run was asked to end.
        """
        ...

    def close(self) -> None:
        """Release what the jobs shared."""
        ...


class LocalLauncher:
    """Stage jobs as processes of this machine.

    Args:
        logs_path: Folder for the log of the local Ray.
        stop: Set to end all jobs.
    """

    def __init__(self, logs_path: Path, stop: threading.Event):
        self._stop = stop
        self._ray = RayHead(logs_path / "ray.log")

    def run(self, spec: JobSpec, *, uses_ray: bool, on_progress: OnProgress) -> JobResult:
        """Run a job in a process of its own, following its progress file."""
        env = {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
        if uses_ray:
            env |= self._ray.environment()
            env[RAY_ADDRESS_PATH_VARIABLE] = str(self._ray.ensure_started())
        attempt = attempts.claim_attempt(spec)
        uri = attempts.attempt_uri(spec, attempt)
        log_path = local_log_path(spec, attempt)
        command = [sys.executable, "-m", "pipelines.job", uri]
        process = children.spawn(command, log_path=log_path, env=env)
        try:
            follower = ProgressFollower(spec, on_progress)
            while process.poll() is None and not self._stop.wait(POLL_S):
                follower.poll()
        finally:
            children.stop(process, GRACE_S)
        if self._stop.is_set():
            raise Stopped(f"stage {spec.stage} was stopped; the next run continues it.")
        outcome = attempts.read_outcome(uri) or _lost(spec, process.returncode, log_path)
        return require_result(outcome, str(log_path))

    def close(self) -> None:
        """Stop the local Ray."""
        self._ray.close()


class ProgressFollower:
    """Reads a job's progress file now and then and passes on what is new.

    Args:
        spec: The job.
        on_progress: Called with the file's content when it changed.
    """

    def __init__(self, spec: JobSpec, on_progress: OnProgress):
        stage_uri = Workspace(spec.workspace).stage_uri(spec.stage, spec.key)
        self._uri = files.join(stage_uri, WORK_NAME, PROGRESS_NAME)
        self._on_progress = on_progress
        self._next_s = 0.0
        self._last: dict[str, Any] | None = None

    def poll(self) -> None:
        """Look again if the last look is long enough ago."""
        if time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + PROGRESS_EVERY_S
        try:
            with patience(0):  # a bar that waited for the store would not see the job's end
                progress = files.read_json(self._uri)
        except (OSError, RuntimeError, ValueError, json.JSONDecodeError):
            return  # not written yet, removed at the commit, or the store is away for a moment
        if progress != self._last:
            self._last = progress
            self._on_progress(progress)


def local_log_path(spec: JobSpec, attempt: int) -> Path:
    """Return the log file of an attempt on this machine."""
    return Workspace(spec.workspace).log_path(spec.stage, spec.key, attempt)


def require_result(outcome: JobResult | Failure, log_path: str) -> JobResult:
    """Return the result, or raise what the job's error says."""
    if isinstance(outcome, Failure):
        raise StageFailed(outcome, log_path)
    return outcome


def _lost(spec: JobSpec, returncode: int, log_path: Path) -> Failure:
    """Explain the end of a process that could not write its outcome."""
    if shutil.disk_usage(log_path.parent).free < FULL_DISK_BYTES:
        message = f"no space left on the disk of {log_path.parent}; free some and run again."
        return Failure(stage=spec.stage, type="OSError", message=message, is_final=True)
    cause = f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"
    message = (
        f"the job's process ended with {cause} and left no result; last line: {_tail(log_path)}"
    )
    return Failure(stage=spec.stage, type="RuntimeError", message=message, is_final=False)


def _tail(log_path: Path) -> str:
    with log_path.open(encoding="utf-8", errors="replace") as lines:
        last = deque((line.strip() for line in lines if line.strip()), maxlen=1)
    return last[0][:300] if last else "(the log is empty)"
