"""One attempt to run a stage, as files that the launcher and the job share.

`<workspace>/jobs/<stage>/<key>/a<attempt>/` holds `job.json` (written first: it claims the number),
and at the end `result.json` or `error.json`. The files, not the status of a process or of a Ray
job, say what happened: they survive the loss of either side, and lie on S3 when the workspace does.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from drorae.config import ACCELERATED, Resources, from_json, to_json
from drorae.failure import Failure
from drorae.store import files


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSpec:
    """All that a stage job has to know."""

    workspace: str
    """Address of the workspace."""
    stage: str
    """Name of the stage."""
    key: str
    """Key of its output."""
    version: int
    """Version of the stage, part of the key."""
    entry: str
    """`module:function` that does the work."""
    sections: tuple[str, ...]
    """Attributes of the full configuration that the function receives."""
    config_type: str
    """`module:Class` of the full configuration."""
    config: dict[str, Any]
    """The full configuration as JSON."""
    input_keys: dict[str, str]
    """Key of every input, by stage name."""
    asking: tuple[str, ...] = ()
    """Stages of the run, which may ask something of the output."""
    sources: dict[str, str] = field(default_factory=dict)
    """Digest of what each image source contained when the run was planned, by its setting."""
    code_digest: str
    """Digest of the code when the run was planned."""
    force: bool = False
    """Build even if the output is there."""
    tracking_uri: str | None = None
    """MLflow server or database; None writes no curves."""
    run_ids: dict[str, str]
    """Ids of the runs that this attempt belongs to: `prefect`, `mlflow`."""
    driver: Resources = field(default_factory=lambda: Resources(cpus=0.0))
    """What the job's own process takes of a cluster."""
    workers: Resources = ACCELERATED
    """What one of its workers or actors takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobResult:
    """How an attempt ended well."""

    outcome: str
    """`built`, or `waited` when another run built the output meanwhile, or `reused`."""
    uri: str
    """Address of the output."""


def attempts_uri(spec: JobSpec) -> str:
    """Return the folder of all attempts for the output of a job."""
    return files.join(spec.workspace, "jobs", spec.stage, spec.key)


def attempt_uri(spec: JobSpec, attempt: int) -> str:
    """Return the folder of one attempt."""
    return files.join(attempts_uri(spec), f"a{attempt}")


def last_attempt(spec: JobSpec) -> int:
    """Return the highest attempt number so far; 0 when there is none."""
    names = files.list_files(attempts_uri(spec))
    return max((int(m[1]) for n in names if (m := re.match(r"a(\d+)/", n))), default=0)


def claim_attempt(spec: JobSpec) -> int:
    """Write `job.json` under the next free attempt number, and return the number.

    Two runs that do this at the same moment get different numbers.
    """
    content = json.dumps(to_json(spec), indent=1).encode()
    attempt = last_attempt(spec) + 1
    while not files.create_exclusive(files.join(attempt_uri(spec, attempt), "job.json"), content):
        attempt += 1
    return attempt


def read_spec(uri: str) -> tuple[JobSpec, int]:
    """Return the job under an attempt folder and its attempt number."""
    return from_json(JobSpec, files.read_json(files.join(uri, "job.json"))), int(
        uri.rstrip("/").rsplit("/a", 1)[1]
    )


def write_outcome(uri: str, outcome: JobResult | Failure) -> None:
    """Write `result.json` or `error.json` into an attempt folder."""
    name = "result.json" if isinstance(outcome, JobResult) else "error.json"
    files.write_json(files.join(uri, name), to_json(outcome))


def read_outcome(uri: str) -> JobResult | Failure | None:
    """Return how an attempt ended; None while it has not."""
    for name, kind in (("result.json", JobResult), ("error.json", Failure)):
        path = files.join(uri, name)
        if files.exists(path):
            return from_json(kind, files.read_json(path))
    return None
