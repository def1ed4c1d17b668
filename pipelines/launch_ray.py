"""Stage jobs on a Ray cluster through the Ray Jobs API.

The submission id is made of stage, key and attempt, so that a restarted flow finds a job that still
runs and follows it instead of starting a second one. The objects in the workspace decide how a job
ended, because the status of a Ray job is lost with its head node; the status is asked only to
notice a job that died without a word.
"""

import logging
import threading
import time
from typing import Any

from drorae.config import Resources
from drorae.failure import Failure
from pipelines import attempt as attempts
from pipelines.attempt import JobResult, JobSpec
from pipelines.launch import OnProgress, ProgressFollower, Stopped, require_result

POLL_S = 1.0
STATUS_EVERY_S = 5.0
LOST_AFTER_S = 300.0
PENDING_S = 180.0  # a job that has a place starts in seconds
SUBMIT_FOR_S = 120.0
# A group that is torn down waits so long for a rank that may be stopped; 30 s by default.
JOB_VARIABLES = {"TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "10"}
FORWARDED_PREFIXES = ("AWS_", "DRORAE_", "MLFLOW_", "RAY_TRAIN_")
RUNNING = frozenset({"PENDING", "RUNNING"})
ON_HEAD = {"node:__internal_head__": 0.001}  # Ray declares this of its head

log = logging.getLogger(__name__)


class ClusterAway(RuntimeError):
    """Nothing answers where the cluster should be."""


class RayJobLauncher:
    """Stage jobs on a cluster.

    Args:
        address: Address of the Jobs API, http://host:8265.
        stop: Set to end all jobs.
        environment: Variables of this process; those that the jobs need are passed on.
    """

    def __init__(self, address: str, stop: threading.Event, environment: dict[str, str]):
        self._address = address
        self._stop = stop
        forwarded = {k: v for k, v in environment.items() if k.startswith(FORWARDED_PREFIXES)}
        self._env = {**JOB_VARIABLES, **forwarded}
        self._client_lock = threading.Lock()
        self._connected: Any = None

    def run(self, spec: JobSpec, *, uses_ray: bool, on_progress: OnProgress) -> JobResult:
        """Follow the running job of this output, or submit one, to its end."""
        attempt = attempts.last_attempt(spec)
        if attempt and self._status(submission_id(spec, attempt)) in RUNNING:
            log.info("following %s, which runs already", submission_id(spec, attempt))
        else:
            attempt = attempts.claim_attempt(spec)
            self._submit(spec, attempt)
        outcome = self._follow(spec, attempt, on_progress)
        return require_result(outcome, f"ray job logs {submission_id(spec, attempt)}")

    def close(self) -> None:
        """Nothing is shared between jobs."""

    def _submit(self, spec: JobSpec, attempt: int) -> None:
        name = submission_id(spec, attempt)
        uri = attempts.attempt_uri(spec, attempt)
        deadline = time.monotonic() + SUBMIT_FOR_S
        while True:
            try:
                self._client().submit_job(
                    entrypoint=f"python -m pipelines.job {uri}",
                    submission_id=name,
                    runtime_env={"env_vars": {**self._env, "DRORAE_RAY_JOB_ID": name}},
                    metadata={"stage": spec.stage, "key": spec.key},
                    **entrypoint_resources(spec.driver),
                )
                return
            except ClusterAway:
                raise
            except (RuntimeError, ConnectionError) as error:
                # A lost answer to a submission that arrived, or a head whose job agent is not up.
                if self._status(name) is not None:
                    return
                if time.monotonic() > deadline or self._stop.wait(POLL_S):
                    raise RuntimeError(
                        f"Ray at {self._address} did not take job {name}: {error}; see its logs."
                    ) from error

    def _follow(self, spec: JobSpec, attempt: int, on_progress: OnProgress) -> JobResult | Failure:
        uri, name = attempts.attempt_uri(spec, attempt), submission_id(spec, attempt)
        follower, pending = ProgressFollower(spec, on_progress), _Pending(spec, name, on_progress)
        next_status_s = time.monotonic() + STATUS_EVERY_S
        answered_s = time.monotonic()
        while not self._stop.wait(POLL_S):
            outcome = attempts.read_outcome(uri)
            if outcome is not None:
                return outcome
            follower.poll()
            if time.monotonic() < next_status_s:
                continue
            next_status_s = time.monotonic() + STATUS_EVERY_S
            status = self._status(name)
            pending.saw(status)
            if status is not None:
                answered_s = time.monotonic()
            silent_s = time.monotonic() - answered_s
            if (status is not None and status not in RUNNING) or silent_s > LOST_AFTER_S:
                # The job may have written its outcome between our two looks.
                return attempts.read_outcome(uri) or _lost(spec, name, status)
        self._stop_job(name)
        raise Stopped(f"stage {spec.stage} was stopped; the next run continues it.")

    def _status(self, name: str) -> str | None:
        """Return the status of a job; None when the cluster does not know it or does not answer."""
        try:
            return str(self._client().get_job_status(name).value)
        except ClusterAway:
            raise
        except (RuntimeError, ConnectionError) as error:
            log.info("no status of %s: %s", name, error)
            return None

    def _stop_job(self, name: str) -> None:
        try:
            self._client().stop_job(name)
        except (RuntimeError, ConnectionError) as error:
            log.warning("job %s could not be stopped and may still run: %s", name, error)

    def _client(self) -> Any:
        """Connect on first use, so that a plan that reuses everything needs no cluster."""
        from ray.job_submission import JobSubmissionClient  # half a second, only with a cluster

        with self._client_lock:
            if self._connected is None:
                try:
                    self._connected = JobSubmissionClient(self._address)
                except ConnectionError as error:
                    raise ClusterAway(
                        f"the Ray cluster at {self._address} does not answer ({error}); expected "
                        "its Jobs API there (port 8265). Start it, or unset DRORAE_RAY_ADDRESS."
                    ) from error
            return self._connected


class _Pending:
    """Says once why a job may not start: Ray keeps one that nothing has room for without a word.

    Args:
        spec: The job.
        name: Its name on the cluster.
        on_progress: Called with the message.
    """

    def __init__(self, spec: JobSpec, name: str, on_progress: OnProgress) -> None:
        self._spec, self._name, self._on_progress = spec, name, on_progress
        self._said_at_s = time.monotonic() + PENDING_S
        self._is_over = False

    def saw(self, status: str | None) -> None:
        """Count the time until a status other than PENDING."""
        self._is_over |= status not in (None, "PENDING")
        if self._is_over or status is None or time.monotonic() < self._said_at_s:
            return
        self._is_over = True
        driver = self._spec.driver
        message = (
            f"waits for room on the Ray head: asks for {driver.cpus:g} CPUs, {driver.gpus:g} GPUs "
            f"and {driver.memory_bytes / 2**30:g} GiB of memory"
        )
        log.warning(
            "job %s has not started for %.0f s: it %s. `ray status -v` tells what the head "
            "declares and what others use: --num-cpus, --num-gpus and --memory of `ray start`; on "
            "Kubernetes rayStartParams, or the limits of the head's container.",
            self._name,
            PENDING_S,
            message,
        )
        self._on_progress({"stage": self._spec.stage, "message": message})


def entrypoint_resources(driver: Resources) -> dict[str, Any]:
    """Return what the Jobs API sets aside for a driver, on the head.

    A job that names resources may run anywhere unless it asks for the head too; a driver on a
    machine that is taken away would take its stage with it.
    """
    return {
        "entrypoint_num_cpus": driver.cpus,
        "entrypoint_num_gpus": driver.gpus,
        "entrypoint_memory": driver.memory_bytes,
        "entrypoint_resources": dict(ON_HEAD),
    }


def submission_id(spec: JobSpec, attempt: int) -> str:
    """Return the name of an attempt on the cluster."""
    return f"{spec.stage}-{spec.key}-a{attempt}"


def _lost(spec: JobSpec, name: str, status: str | None) -> Failure:
    message = f"Ray job {name} ended with status {status or 'unknown'} and left no result."
    return Failure(stage=spec.stage, type="RuntimeError", message=message, is_final=False)
