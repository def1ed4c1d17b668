"""The MLflow runs of a pipeline run: one parent, and one nested run per stage that is built.

Both are found again by their key, so that a retry or a restarted run continues the same curves.
Opening takes seconds the first time (a fresh database), so it happens in a thread while the other
services start.
"""

import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drorae.config import flatten
from drorae.tracking import finish_run, open_run
from pipelines.plain_path import plain_path
from pipelines.plan import RunPlan
from pipelines.stages import Stage, section_values

EXPERIMENT = "drorae"
OFF = "none"

log = logging.getLogger(__name__)


def tracking_uri(root: Path, *, is_shared: bool) -> str | None:
    """Return where curves go: the configured MLflow, or a database in the workspace.

    Args:
        root: Local folder of the workspace.
        is_shared: Whether the jobs run on other machines, which cannot write that database.
    """
    uri = os.environ.get("DRORAE_TRACKING_URI") or os.environ.get("MLFLOW_TRACKING_URI")
    if uri == OFF or (uri is None and is_shared):
        if uri is None:
            log.warning("no curves are kept: set DRORAE_TRACKING_URI to an MLflow server.")
        return None
    return uri or f"sqlite:///{plain_path(root) / 'mlflow' / 'mlflow.db'}"


class TrackedRuns:
    """Opens and ends the MLflow runs of one pipeline run.

    A server that does not answer costs the curves, never the training: it is logged once.

    Args:
        plan: The run.
        uri: MLflow server or database; None opens nothing.
        root: Local folder of the workspace, for the lock that two runs share.
        tags: Tags of the parent run.
    """

    def __init__(self, plan: RunPlan, uri: str | None, root: Path, tags: dict[str, str]):
        self.uri = uri
        self._plan = plan
        self._tags = tags
        self._lock_path = root / "mlflow" / "lock"
        self._lock = threading.Lock()
        self._stage_runs: dict[str, str] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._parent: Future[str | None] = self._pool.submit(self._open_parent)

    def open_stage(self, stage: Stage) -> str | None:
        """Return the run of a stage, created on its first attempt and continued on the next."""
        parent = self._parent.result()
        if parent is None or stage.name in self._stage_runs:
            return self._stage_runs.get(stage.name)
        key = self._plan.keys[stage.name]
        run_id = self._open(
            run_key=f"{stage.name}-{key}",
            name=stage.name,
            parent_run_id=parent,
            params=_section_params(self._plan.full, stage),
            tags={"drorae.stage": stage.name, "drorae.key": key},
        )
        if run_id is not None:
            self._stage_runs[stage.name] = run_id
        return run_id

    def finish_stage(self, stage: str, status: str) -> None:
        """Set the status of a stage's run: FINISHED, FAILED or KILLED."""
        self._finish(self._stage_runs.get(stage), status)

    def close(self, status: str) -> None:
        """Set the status of the parent run and end the thread."""
        self._finish(self._parent.result(), status)
        self._pool.shutdown()

    def _open_parent(self) -> str | None:
        return self._open(
            run_key=self._plan.run_key,
            name=self._plan.request.recipe,
            parent_run_id=None,
            params=flatten(self._plan.full),
            tags=self._tags,
        )

    def _open(self, **arguments: Any) -> str | None:
        if self.uri is None:
            return None
        try:
            with self._lock, _file_lock(self._lock_path):
                return open_run(self.uri, EXPERIMENT, **arguments)
        except (RuntimeError, OSError) as error:
            log.warning("MLflow at %s: %s; these curves are not kept.", self.uri, error)
            return None

    def _finish(self, run_id: str | None, status: str) -> None:
        if self.uri is None or run_id is None:
            return
        try:
            finish_run(self.uri, run_id, status)
        except (RuntimeError, OSError) as error:
            log.warning("MLflow at %s: %s; run %s stays open.", self.uri, error, run_id)


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Hold a lock against other processes: two that find no run would both create it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _section_params(full: Any, stage: Stage) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for name, value in section_values(full, stage).items():
        if isinstance(value, str | int | float | None):
            params[name] = value
        else:
            params |= flatten(value, f"{name}.")
    return params
