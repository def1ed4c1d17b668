"""Runs of MLflow, found again by a key of ours: opened, continued, ended."""

from collections.abc import Mapping
from typing import Any

from drorae.tracking.client import add_params, open_client
from drorae.tracking.retries import asked_again
from drorae.tracking.sqlite import artifact_location, sqlite_lock

RUN_KEY_TAG = "drorae.run_key"
PARENT_TAG = "mlflow.parentRunId"  # what MLflow's own nested runs use
END_STATES = ("FINISHED", "FAILED", "KILLED")


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
        client = open_client(uri)
        with sqlite_lock(uri):  # else two processes may both find no run and create one each
            experiment_id = _experiment_id(client, uri, experiment)
            run_id = _find_run(client, experiment_id, run_key)
            if run_id is None:
                run = client.create_run(experiment_id, tags=all_tags, run_name=name)
                add_params(client, run.info.run_id, params or {})
                return run.info.run_id
        client.update_run(run_id, status="RUNNING", name=name)
        for key, value in all_tags.items():
            client.set_tag(run_id, key, value)
        add_params(client, run_id, params or {})
        return run_id

    return asked_again(uri, attempt)


def finish_run(uri: str, run_id: str, status: str = "FINISHED") -> None:
    """End a run.

    Raises:
        ValueError: If the status is none of `END_STATES`.
        RuntimeError: If MLflow does not answer.
    """
    if status not in END_STATES:
        raise ValueError(f"status={status!r} is no end state: expected one of {END_STATES}.")
    asked_again(uri, lambda: open_client(uri).set_terminated(run_id, status))


def _find_run(client: Any, experiment_id: str, run_key: str) -> str | None:
    query = f"tags.`{RUN_KEY_TAG}` = '{run_key}'"
    order = ["attributes.start_time ASC"]
    runs = client.search_runs([experiment_id], query, max_results=1, order_by=order)
    return runs[0].info.run_id if runs else None


def _experiment_id(client: Any, uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifact_location(uri))
        except Exception:
            found = client.get_experiment_by_name(name)  # another process was faster
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id
