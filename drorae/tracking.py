"""MLflow: one parent run per pipeline run, one nested run per stage, continued across attempts.

The only module that knows mlflow, by MlflowClient alone: no global run, no autologging. A tracker
hands points to a thread with a bounded queue, so that neither a slow nor an absent server blocks a
training step; what was logged meanwhile is delivered in order when the server is back. What waited
in a process that was killed is delivered by the next attempt, from the history in its checkpoint.
SQLite serves several processes of one machine; a cluster uses a server. Files under ./mlruns are
never made.
"""

import contextlib
import fcntl
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

T = TypeVar("T")

RUN_KEY_TAG = "drorae.run_key"
PARENT_TAG = "mlflow.parentRunId"  # what MLflow's own nested runs use
END_STATES = ("FINISHED", "FAILED", "KILLED")
MAX_PARAM_LENGTH = 6000  # MLflow 3.17, utils/validation.py MAX_PARAM_VAL_LENGTH
MAX_METRICS_PER_BATCH = 1000  # MLflow 3.17, utils/validation.py
MAX_PARAMS_PER_BATCH = 100  # MLflow 3.17, utils/validation.py
MAX_WAITING_ITEMS = 20_000  # hours of log points at one a second, about 10 MB
MAX_WAITING_IMAGE_BYTES = 256 * 2**20
RETRY_S = (0.5, 15.0)
OPEN_PATIENCE_S = 75.0  # a server that is restarted takes 16 to 32 s (measured 2026-11-21)

# Errors that repeating cannot cure: the item is dropped with a warning, the rest goes on.
_PERMANENT = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "PERMISSION_DENIED",
    "RESOURCE_DOES_NOT_EXIST",
    "UNAUTHENTICATED",
}


class Tracker(Protocol):
    """Where a loop sends its numbers and pictures. No method blocks but `close`."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers of one step."""
        ...

    def catch_up(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Log what of the rows of an earlier attempt was not delivered; each has its `step`."""
        ...

    def image(self, name: str, image: "np.ndarray", step: int) -> None:
        """Log a picture: uint8, height x width x 3."""
        ...

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Copy a local file to the run's artifacts; it must stay in place until `close`."""
        ...

    def close(self) -> None:
        """Deliver what is left."""
        ...


class NullTracker:
    """Tracks nothing: ranks other than 0, and runs without a tracking address."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Ignore numbers."""

    def catch_up(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Ignore numbers."""

    def image(self, name: str, image: "np.ndarray", step: int) -> None:
        """Ignore a picture."""

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Ignore a file."""

    def close(self) -> None:
        """Nothing is waiting."""


class TrackedStage(Protocol):
    """What `connect` reads of a stage context."""

    tracking_uri: str | None
    tracking_run_id: str | None


def connect(ctx: TrackedStage) -> Tracker:
    """The tracker of a stage: its MLflow run, or nothing if it has none."""
    if ctx.tracking_uri and ctx.tracking_run_id:
        return MlflowTracker(ctx.tracking_uri, ctx.tracking_run_id)
    return NullTracker()


@dataclass(frozen=True, slots=True)
class _Points:
    values: tuple[tuple[str, float], ...]
    step: int
    timestamp_ms: int


@dataclass(frozen=True, slots=True)
class _Picture:
    name: str
    image: "np.ndarray"
    step: int
    timestamp_ms: int


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    folder: str


@dataclass(frozen=True, slots=True)
class _Earlier:
    rows: tuple[_Points, ...]


_Item = _Points | _Picture | _File | _Earlier


class MlflowTracker:
    """Sends to one MLflow run from a thread.

    Args:
        uri: MLflow tracking address: http(s)://... or sqlite:///file.
        run_id: Run from `open_run`.
        make_client: Builds the MlflowClient, in the thread.
        flush_every_s: Pause in which points gather into one request.
        close_timeout_s: Longest time that `close` waits for an absent server.
    """

    def __init__(
        self,
        uri: str,
        run_id: str,
        *,
        make_client: Callable[[str], Any] | None = None,
        flush_every_s: float = 1.0,
        close_timeout_s: float = 120.0,
    ):
        self.uri = uri
        self.run_id = run_id
        self.num_dropped = 0
        self._make_client = make_client or _client
        self._flush_every_s = flush_every_s
        self._close_timeout_s = close_timeout_s
        self._items: deque[_Item] = deque()
        self._known: set[tuple[str, int, float]] = set()
        self._image_bytes = 0
        self._closing = False
        self._give_up = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue the numbers of one step; never blocks."""
        values = tuple((_legal(k), float(v)) for k, v in metrics.items())
        self._put(_Points(values, int(step), _now_ms()))

    def catch_up(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Queue the rows of an earlier attempt; never blocks.

        The server is asked which it lacks. From then on rows whose step and first value it has are
        left out, so that steps which are trained once more appear once.
        """
        now_ms = _now_ms()
        points = []
        for row in rows:
            values = tuple((_legal(k), float(v)) for k, v in row.items() if k != "step")
            points.append(_Points(values, int(row["step"]), now_ms))
        self._put(_Earlier(tuple(points)))

    def image(self, name: str, image: "np.ndarray", step: int) -> None:
        """Queue a picture (uint8, height x width x 3); never blocks.

        Raises:
            ValueError: If it is of another shape or type.
        """
        if image.ndim != 3 or image.shape[2] != 3 or str(image.dtype) != "uint8":
            raise ValueError(
                f"image {name!r} has shape {tuple(image.shape)} and type {image.dtype}: expected "
                f"uint8 "
                f"height x width x 3; convert it."
            )
        self._put(_Picture(_legal(name), image.copy(), int(step), _now_ms()))

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Queue a file; it must stay in place until `close`.

        Raises:
            FileNotFoundError: If there is no such file.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"artifact {path} does not exist: expected a file; write it first."
            )
        self._put(_File(str(path), folder))

    def close(self) -> None:
        """Deliver what is left, waiting at most `close_timeout_s`; a second call does nothing."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(self._close_timeout_s)
        if self._thread.is_alive():
            self._give_up = True
            log.warning("MLflow %s: %d entries were not delivered", self.uri, len(self._items))

    def _put(self, item: _Item) -> None:
        with self._changed:
            size_bytes = item.image.nbytes if isinstance(item, _Picture) else 0
            too_large = size_bytes and self._image_bytes + size_bytes > MAX_WAITING_IMAGE_BYTES
            if self._closing or too_large or len(self._items) >= MAX_WAITING_ITEMS:
                self.num_dropped += 1
                if self.num_dropped == 1:
                    log.warning("MLflow %s: queue closed or full, entries are dropped", self.uri)
                return
            self._image_bytes += size_bytes
            self._items.append(item)
            self._changed.notify_all()

    def _deliver(self) -> None:
        client, retry_s = None, RETRY_S[0]
        while batch := self._next_batch():
            try:
                client = client or self._make_client(self.uri)
                self._send(client, batch)
            except Exception as error:
                if not _is_permanent(error):
                    retry_s = self._wait_for_server(error, retry_s)
                    continue
                log.warning("MLflow %s refused %s: %s", self.uri, type(batch[0]).__name__, error)
            if retry_s > RETRY_S[0]:
                log.info("MLflow %s answers again", self.uri)
            retry_s = RETRY_S[0]
            self._forget(batch)

    def _next_batch(self) -> list[_Item]:
        """The oldest items that fit one request; empty when closed and drained."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closing)
            self._changed.wait_for(lambda: self._closing, timeout=self._flush_every_s)
            batch: list[_Item] = []
            num_points = 0
            for item in () if self._give_up else self._items:
                num_points += len(item.values) if isinstance(item, _Points) else 0
                if batch and (not isinstance(item, _Points) or num_points > MAX_METRICS_PER_BATCH):
                    break
                batch.append(item)
                if not isinstance(item, _Points):
                    break
            return batch

    def _send(self, client: Any, batch: list[_Item]) -> None:
        first = batch[0]
        if isinstance(first, _Points):
            self._send_points(client, [item for item in batch if isinstance(item, _Points)])
        elif isinstance(first, _Earlier):
            self._ask_for_known(client, first.rows)
            self._send_points(client, first.rows)
        elif isinstance(first, _Picture):
            client.log_image(
                self.run_id,
                first.image,
                key=first.name,
                step=first.step,
                timestamp=first.timestamp_ms,
                synchronous=True,
            )
        else:
            client.log_artifact(self.run_id, first.path, first.folder or None)

    def _ask_for_known(self, client: Any, rows: Sequence[_Points]) -> None:
        """Ask which rows the server has, by their first value."""
        for name in {row.values[0][0] for row in rows if row.values}:
            metrics = client.get_metric_history(self.run_id, name)
            self._known |= {(name, m.step, m.value) for m in metrics}

    def _is_known(self, points: _Points) -> bool:
        return any((name, points.step, value) in self._known for name, value in points.values[:1])

    def _send_points(self, client: Any, points: Sequence[_Points]) -> None:
        from mlflow.entities import Metric  # in the thread: mlflow takes seconds to import

        requests: list[list[Any]] = [[]]
        for p in points:
            if self._is_known(p):
                continue
            row = [Metric(k, v, p.timestamp_ms, p.step) for k, v in p.values]
            # The server takes a request whole or not, and so each row.
            if requests[-1] and len(requests[-1]) + len(row) > MAX_METRICS_PER_BATCH:
                requests.append([])
            requests[-1] += row
        for rows in requests:
            for start in range(0, len(rows), MAX_METRICS_PER_BATCH):
                client.log_batch(self.run_id, metrics=rows[start : start + MAX_METRICS_PER_BATCH])

    def _wait_for_server(self, error: Exception, retry_s: float) -> float:
        if retry_s == RETRY_S[0]:
            log.warning("MLflow %s does not answer, points wait: %s", self.uri, error)
        time.sleep(retry_s)
        # Close to the end of a run the server may be back any moment: keep the pauses short.
        return min(retry_s * 2, 1.0 if self._closing else RETRY_S[1])

    def _forget(self, batch: list[_Item]) -> None:
        with self._changed:
            for item in batch:
                self._items.popleft()
                self._image_bytes -= item.image.nbytes if isinstance(item, _Picture) else 0


def open_run(
    uri: str,
    experiment: str,
    run_key: str,
    name: str,
    parent_run_id: str | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
) -> str:
    """Continue the run of a key, or create it; either way it is RUNNING afterwards.

    Args:
        uri: MLflow tracking address; the folder of a sqlite:/// file is made.
        experiment: Experiment name; made if missing.
        run_key: What identifies the run across attempts and restarts.
        name: Name to show.
        parent_run_id: Run under which this one is nested.
        params: Flat parameters. MLflow lets none change: on a continued run only new ones are
            added.
        tags: More tags; these do change.

    Returns:
        The run id.

    Raises:
        ValueError: If the key holds a quote.
        RuntimeError: If MLflow does not answer.
    """
    if "'" in run_key or not run_key:
        raise ValueError(f"run_key={run_key!r} is not allowed: expected text without quotes.")
    all_tags = {RUN_KEY_TAG: run_key, **{k: str(v) for k, v in (tags or {}).items()}}
    if parent_run_id:
        all_tags[PARENT_TAG] = parent_run_id

    def attempt() -> str:
        client = _client(uri)
        with _sqlite_lock(uri):  # else two processes may both find no run and create one each
            experiment_id = _experiment_id(client, uri, experiment)
            run_id = _find_run(client, experiment_id, run_key)
            if run_id is None:
                return _create_run(client, experiment_id, name, all_tags, params or {})
        client.update_run(run_id, status="RUNNING", name=name)
        for key, value in all_tags.items():
            client.set_tag(run_id, key, value)
        _add_params(client, run_id, params or {})
        return run_id

    return _asked_again(uri, attempt)


def finish_run(uri: str, run_id: str, status: str = "FINISHED") -> None:
    """End a run.

    Raises:
        ValueError: If the status is none of `END_STATES`.
        RuntimeError: If MLflow does not answer.
    """
    if status not in END_STATES:
        raise ValueError(f"status={status!r} is no end state: expected one of {END_STATES}.")
    _asked_again(uri, lambda: _client(uri).set_terminated(run_id, status))


def _create_run(
    client: Any, experiment_id: str, name: str, tags: dict[str, str], params: Mapping[str, Any]
) -> str:
    run_id = client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
    _add_params(client, run_id, params)
    return run_id


def _find_run(client: Any, experiment_id: str, run_key: str) -> str | None:
    query = f"tags.`{RUN_KEY_TAG}` = '{run_key}'"
    order = ["attributes.start_time ASC"]
    runs = client.search_runs([experiment_id], query, max_results=1, order_by=order)
    return runs[0].info.run_id if runs else None


def _add_params(client: Any, run_id: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    texts = {_legal(k): _shortened(str(v)) for k, v in params.items()}
    new = [Param(k, v) for k, v in texts.items() if k not in known]
    for start in range(0, len(new), MAX_PARAMS_PER_BATCH):
        client.log_batch(run_id, params=new[start : start + MAX_PARAMS_PER_BATCH])


def _experiment_id(client: Any, uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=_artifact_location(uri))
        except Exception:
            found = client.get_experiment_by_name(name)  # another process was faster
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def _artifact_location(uri: str) -> str | None:
    # A server knows its own place; for SQLite the default would be ./mlruns in the current folder.
    database = _sqlite_path(uri)
    return (database.parent / "mlflow-artifacts").as_uri() if database else None


def _client(uri: str) -> Any:
    """An MlflowClient whose database, if it is SQLite, exists and is migrated."""
    # Before the import, which reads them. The retries are ours: MLflow's own would block for
    # minutes.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient  # here, not at the top: it takes seconds to import

    # Two processes that migrate a fresh SQLite file at once break it ("table exists already").
    with _sqlite_lock(uri):
        client = MlflowClient(tracking_uri=uri)
        if _sqlite_path(uri):
            client.search_experiments(max_results=1)
    return client


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:") else None


@contextlib.contextmanager
def _sqlite_lock(uri: str) -> Iterator[None]:
    database = _sqlite_path(uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{database}.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _asked_again(uri: str, call: Callable[[], T]) -> T:
    """Result of a call that is repeated while the server is away or the database is locked."""
    pause_s, deadline_s = RETRY_S[0], time.monotonic() + OPEN_PATIENCE_S
    while True:
        try:
            return call()
        except Exception as error:
            if _is_permanent(error):
                raise
            if time.monotonic() + pause_s > deadline_s:
                raise RuntimeError(
                    f"MLflow at {uri} did not answer for {OPEN_PATIENCE_S:.0f} s ({error}): "
                    f"expected a running server or a writable SQLite file; start it or correct "
                    f"the tracking address."
                ) from error
            if pause_s == RETRY_S[0]:
                log.warning("MLflow %s did not answer, asking again: %s", uri, error)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, RETRY_S[1])


def _is_permanent(error: Exception) -> bool:
    code = getattr(error, "error_code", "")
    is_caller_error = isinstance(error, TypeError | ValueError | FileNotFoundError | ImportError)
    return code in _PERMANENT or is_caller_error


def _legal(name: str) -> str:
    """A metric or parameter name in MLflow's alphabet, at most 250 characters (MLflow 3.17)."""
    return re.sub(r"[^\w./ :-]", "_", name)[:250]


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_PARAM_LENGTH else text[: MAX_PARAM_LENGTH - 3] + "..."


def _now_ms() -> int:
    return int(time.time() * 1000)
