"""The only module that imports mlflow: a client, and requests of a size that it accepts.

The imports stand in the functions because mlflow takes seconds to import.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from drorae.tracking.limits import (
    MAX_METRICS_PER_BATCH,
    MAX_PARAMS_PER_BATCH,
    legal,
    shortened,
)
from drorae.tracking.outbox import Points
from drorae.tracking.sqlite import sqlite_lock, sqlite_path


def open_client(uri: str) -> Any:
    """An MlflowClient whose database, if it is SQLite, exists and is migrated."""
    # Before the import, which reads them. The retries are ours: MLflow's own would block for
    # minutes.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient

    # Two processes that migrate a fresh SQLite file at once break it ("table exists already").
    with sqlite_lock(uri):
        client = MlflowClient(tracking_uri=uri)
        if sqlite_path(uri):
            client.search_experiments(max_results=1)
    return client


def send_points(client: Any, run_id: str, points: Iterable[Points]) -> None:
    """Log the numbers of some steps.

    The server takes a request whole or not at all, and so each step, if it fits one.
    """
    from mlflow.entities import Metric

    requests: list[list[Metric]] = [[]]
    for p in points:
        row = [Metric(k, v, p.timestamp_ms, p.step) for k, v in p.values]
        if requests[-1] and len(requests[-1]) + len(row) > MAX_METRICS_PER_BATCH:
            requests.append([])
        requests[-1] += row
    for rows in requests:
        for start in range(0, len(rows), MAX_METRICS_PER_BATCH):
            client.log_batch(run_id, metrics=rows[start : start + MAX_METRICS_PER_BATCH])


def delivered(client: Any, run_id: str, rows: Sequence[Points]) -> set[tuple[str, int, float]]:
    """First value of every row that the server has, as (name, step, value)."""
    names = {row.values[0][0] for row in rows if row.values}
    history = [metric for name in names for metric in client.get_metric_history(run_id, name)]
    return {(metric.key, metric.step, metric.value) for metric in history}


def add_params(client: Any, run_id: str, params: Mapping[str, Any]) -> None:
    """Log the parameters that the run does not have yet; MLflow lets none change."""
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    texts = {legal(k): shortened(str(v)) for k, v in params.items()}
    new = [Param(k, v) for k, v in texts.items() if k not in known]
    for start in range(0, len(new), MAX_PARAMS_PER_BATCH):
        client.log_batch(run_id, params=new[start : start + MAX_PARAMS_PER_BATCH])
