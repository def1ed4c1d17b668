"""The program of one stage job: `python -m pipelines.job ATTEMPT_URI`.

Both launchers start it, as a local process or as the driver of a Ray job. It reads `job.json`,
builds the output once (drorae.store decides between reuse, waiting and work), and writes
`result.json` or `error.json`. The trace of an error goes to the log only. Exit codes: 0 done, 1
failed, 2 failed so that trying again cannot help, 143 ended by SIGTERM.
"""

import functools
import importlib
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from drorae.config import from_json, to_json
from drorae.failure import Failure, describe_failure
from drorae.store.context import StageContext, StageResult
from drorae.store.stage_run import run_once
from drorae.store.stage_work import drop_work_of_other_inputs
from drorae.store.workspace import StageOutput, Workspace
from pipelines import attempt as attempts
from pipelines import children, ray_head
from pipelines.stages import SOURCES, check_listed

RAY_ADDRESS_PATH_VARIABLE = "DRORAE_RAY_ADDRESS_PATH"

log = logging.getLogger("pipelines.job")


def resolve(path: str) -> Any:
    """Import `module:name`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def run_attempt(uri: str) -> attempts.JobResult:
    """Run the job of an attempt folder in this process, and return how it ended."""
    spec, attempt = attempts.read_spec(uri)
    full = from_json(resolve(spec.config_type), spec.config)
    sections = {name: getattr(full, name) for name in spec.sections}
    workspace = Workspace(spec.workspace)
    output, outcome = run_once(
        workspace,
        spec.stage,
        spec.key,
        lambda: _build(spec, attempt, workspace, full, sections),
        manifest_fields=_manifest_fields(spec, attempt, full, sections),
        on_wait=lambda owner: log.info("waiting for %s, which builds this output now", owner),
        force=spec.force,
    )
    return attempts.JobResult(outcome=outcome, uri=output.uri)


def _build(
    spec: attempts.JobSpec, attempt: int, workspace: Workspace, full: Any, sections: dict
) -> StageResult:
    ctx = StageContext(
        stage=spec.stage,
        key=spec.key,
        output_uri=workspace.stage_uri(spec.stage, spec.key),
        inputs={name: _input(workspace, name, key) for name, key in spec.input_keys.items()},
        compute=full.compute,
        workers=spec.workers,
        tracking_uri=spec.tracking_uri,
        tracking_run_id=spec.run_ids.get("mlflow"),
        attempt=attempt,
        check_counts=functools.partial(check_listed, full, spec.stage, spec.asking),
    )
    drop_work_of_other_inputs(ctx)
    # Importing torch takes seconds in which the local Ray comes up; only then ask for its address.
    entry = resolve(spec.entry)
    address_path = os.environ.get(RAY_ADDRESS_PATH_VARIABLE)
    if address_path:
        os.environ["RAY_ADDRESS"] = ray_head.wait_for_address(Path(address_path))
    return entry(ctx, **sections)


def _input(workspace: Workspace, name: str, key: str) -> StageOutput:
    output = workspace.find(name, key)
    if output is None:
        raise RuntimeError(
            f"the output of {name} (key {key}) is not in {workspace.uri}, though it was there when "
            "this stage was started; run again to rebuild it."
        )
    return output


def _manifest_fields(
    spec: attempts.JobSpec, attempt: int, full: Any, sections: dict[str, Any]
) -> dict[str, Any]:
    return {
        "version": spec.version,
        "config": to_json(sections) | ({SOURCES: spec.sources} if spec.sources else {}),
        "input_keys": spec.input_keys,
        "seed": sections.get("seed"),
        "code_digest": spec.code_digest,
        "attempt": attempt,
        "run_ids": {**spec.run_ids, "ray": os.environ.get("DRORAE_RAY_JOB_ID", "")},
        "num_devices": full.compute.num_workers if full.compute.use_gpu else 1,
    }


def main(argv: list[str]) -> int:
    """Run one attempt as a program, and return its exit code."""
    children.end_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    uri = argv[0]
    try:
        outcome: attempts.JobResult | Failure = run_attempt(uri)
    except Exception as error:
        log.exception("the stage failed")
        outcome = describe_failure(error, stage=uri.rstrip("/").split("/")[-3])
    attempts.write_outcome(uri, outcome)
    if isinstance(outcome, Failure):
        return 2 if outcome.is_final else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
