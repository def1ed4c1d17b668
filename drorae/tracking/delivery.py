"""The tracker of a stage: queues what the loop logs, and sends it to MLflow from a thread.

What was logged while the server was away is delivered in order when it is back. What waited in a
process that was killed is delivered by the next attempt, from the history in its checkpoint. An
entry that the server refuses is dropped with a warning, and the rest goes on.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from drorae.tracking import retries
from drorae.tracking.client import delivered, open_client, send_points
from drorae.tracking.limits import legal
from drorae.tracking.outbox import Earlier, File, Item, Outbox, Picture, Points
from drorae.tracking.tracker import NullTracker, Tracker

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)


class TrackedStage(Protocol):
    """What `connect` reads of a stage context."""

    tracking_uri: str | None
    tracking_run_id: str | None


def connect(ctx: TrackedStage) -> Tracker:
    """The tracker of a stage: its MLflow run, or nothing if it has none."""
    if ctx.tracking_uri and ctx.tracking_run_id:
        return MlflowTracker(ctx.tracking_uri, ctx.tracking_run_id)
    return NullTracker()


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
        make_client: Callable[[str], Any] = open_client,
        flush_every_s: float = 1.0,
        close_timeout_s: float = 120.0,
    ):
        self.uri = uri
        self.run_id = run_id
        self._make_client = make_client
        self._flush_every_s = flush_every_s
        self._close_timeout_s = close_timeout_s
        self._outbox = Outbox(f"MLflow {uri}")
        self._known: set[tuple[str, int, float]] = set()
        self._thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def num_dropped(self) -> int:
        """Entries that found the queue full or closed."""
        return self._outbox.num_dropped

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue the numbers of one step; never blocks."""
        self._outbox.put(_points(metrics, step))

    def catch_up(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Queue the rows of an earlier attempt; never blocks.

        The server is asked which it lacks. From then on rows whose step and first value it has are
        left out, so that steps which are trained once more appear once.
        """
        values = ({k: v for k, v in row.items() if k != "step"} for row in rows)
        points = (_points(v, int(r["step"])) for v, r in zip(values, rows, strict=True))
        self._outbox.put(Earlier(tuple(points)))

    def image(self, name: str, image: "np.ndarray", step: int) -> None:
        """Queue a picture (uint8, height x width x 3); never blocks.

        Raises:
            ValueError: If it is of another shape or type.
        """
        if image.ndim != 3 or image.shape[2] != 3 or str(image.dtype) != "uint8":
            raise ValueError(
                f"image {name!r} has shape {tuple(image.shape)} and type {image.dtype}: expected "
                f"uint8 height x width x 3; convert it."
            )
        self._outbox.put(Picture(legal(name), image.copy(), int(step), _now_ms()))

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Queue a file; it must stay in place until `close`.

        Raises:
            FileNotFoundError: If there is no such file.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"artifact {path} does not exist: expected a file; write it first."
            )
        self._outbox.put(File(str(path), folder))

    def close(self) -> None:
        """Deliver what is left, waiting at most `close_timeout_s`; a second call does nothing."""
        self._outbox.close()
        self._thread.join(self._close_timeout_s)
        if self._thread.is_alive():
            self._outbox.give_up()
            log.warning(
                "MLflow %s: %d entries were not delivered", self.uri, self._outbox.num_waiting
            )

    def _deliver(self) -> None:
        client, retry_s = None, retries.RETRY_S[0]
        while batch := self._outbox.next_batch(self._flush_every_s):
            try:
                client = client or self._make_client(self.uri)
                self._send(client, batch)
            except Exception as error:
                if not retries.is_permanent(error):
                    retry_s = self._wait_for_server(error, retry_s)
                    continue
                log.warning("MLflow %s refused %s: %s", self.uri, type(batch[0]).__name__, error)
            if retry_s > retries.RETRY_S[0]:
                log.info("MLflow %s answers again", self.uri)
            retry_s = retries.RETRY_S[0]
            self._outbox.forget(batch)

    def _send(self, client: Any, batch: list[Item]) -> None:
        first = batch[0]
        if isinstance(first, Points):
            self._send_points(client, [item for item in batch if isinstance(item, Points)])
        elif isinstance(first, Earlier):
            self._known |= delivered(client, self.run_id, first.rows)
            self._send_points(client, first.rows)
        elif isinstance(first, Picture):
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

    def _send_points(self, client: Any, points: Sequence[Points]) -> None:
        new = [p for p in points if not any((k, p.step, v) in self._known for k, v in p.values[:1])]
        send_points(client, self.run_id, new)

    def _wait_for_server(self, error: Exception, retry_s: float) -> float:
        if retry_s == retries.RETRY_S[0]:
            log.warning("MLflow %s does not answer, points wait: %s", self.uri, error)
        time.sleep(retry_s)
        # Close to the end of a run the server may be back any moment: keep the pauses short.
        return min(retry_s * 2, 1.0 if self._outbox.is_closed else retries.RETRY_S[1])


def _points(metrics: Mapping[str, float], step: int) -> Points:
    values = tuple((legal(k), float(v)) for k, v in metrics.items())
    return Points(values, int(step), _now_ms())


def _now_ms() -> int:
    return int(time.time() * 1000)
