"""Run a stage at most once: reuse what is committed, else build under a lease and commit.

A killed attempt leaves its files and `_work` behind without a manifest; the next one continues
there. Two runs that race for one key: one works, the other waits and reuses what the first
committed.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from drorae.store import files
from drorae.store.context import StageResult
from drorae.store.files import join
from drorae.store.lease import Lease, acquire
from drorae.store.lease_owner import DEFAULT_TTL_S, LeaseOwner
from drorae.store.manifest import (
    MANIFEST_NAME,
    DamagedOutput,
    Manifest,
    decode_manifest,
    describe_hardware,
    encode_manifest,
    finite_metrics,
    installed_packages,
)
from drorae.store.workspace import WORK_NAME, StageOutput, Verify, Workspace

log = logging.getLogger(__name__)

How = Literal["reused", "built", "waited"]
MANIFEST_FIELDS = frozenset(
    {
        "version",
        "config",
        "input_keys",
        "seed",
        "code_digest",
        "attempt",
        "run_ids",
        "hardware",
        "num_devices",
    }
)


def run_once(
    workspace: Workspace,
    stage: str,
    key: str,
    build: Callable[[], StageResult],
    *,
    manifest_fields: Mapping[str, Any] | None = None,
    on_wait: Callable[[LeaseOwner], None] | None = None,
    force: bool = False,
    verify: Verify = "size",
    ttl_s: float = DEFAULT_TTL_S,
    poll_s: float = 1.0,
) -> tuple[StageOutput, How]:
    """The committed output of a key: found, waited for, or built now.

    Args:
        workspace: Where outputs lie.
        stage: Stage name.
        key: Key of the output, from `keys.stage_key`.
        build: Writes the files of the output and returns them; called at most once, under the
            lease.
        manifest_fields: What the manifest records beyond the result: any of `MANIFEST_FIELDS`.
            `hardware` is merged over what this machine tells (give `{"gpus": [...]}`);
            `num_devices` turns wall seconds into device-hours.
        on_wait: Told who holds the lease, once at first and then every half a minute.
        force: Build again even if there is an intact output; the old one stops existing first.
        verify: How an output that exists is checked before it is reused.
        ttl_s: Seconds without a sign of life after which another writer's lease is taken over.
        poll_s: Seconds between two looks while waiting.

    Returns:
        The output, and "reused", "built", or "waited" if another writer built it meanwhile.

    Raises:
        ValueError: Unknown manifest field, or a result that names a file twice.
        RuntimeError: If the lease was lost while building, or a file of the result is not there.
    """
    fields = _checked_fields(manifest_fields or {})
    before = _find_intact(workspace, stage, key, verify)
    if before and not force:
        return before, "reused"
    run = _Run(workspace, stage, key, verify, before.manifest if before else None)
    lease = acquire(
        workspace.lease_uri(stage, key),
        str(fields.get("run_ids", {}).get("prefect") or f"stage {stage}"),
        ttl_s,
        until=lambda: run.built_by_other() is not None,
        on_wait=on_wait,
        poll_s=poll_s,
    )
    if lease is None:
        return _require_output(run), "waited"
    with lease:
        # The writer that we waited for may have committed between our two looks.
        meanwhile = run.built_by_other()
        if meanwhile:
            return meanwhile, "waited"
        _withdraw(run)
        started_s = time.monotonic()
        result = build()
        return _commit(run, result, fields, time.monotonic() - started_s, lease), "built"


@dataclass(frozen=True, slots=True)
class _Run:
    """One call of `run_once`."""

    workspace: Workspace
    stage: str
    key: str
    verify: Verify
    before: Manifest | None

    @property
    def uri(self) -> str:
        return self.workspace.stage_uri(self.stage, self.key)

    def built_by_other(self) -> StageOutput | None:
        """An intact output that was not there when this call began."""
        output = _find_intact(self.workspace, self.stage, self.key, self.verify, logged=False)
        return output if output and output.manifest != self.before else None


def _checked_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(given) - MANIFEST_FIELDS)
    if unknown:
        raise ValueError(
            f"manifest_fields has {unknown}: expected only {sorted(MANIFEST_FIELDS)}; correct the "
            f"name."
        )
    return dict(given)


def _find_intact(
    workspace: Workspace, stage: str, key: str, verify: Verify, *, logged: bool = True
) -> StageOutput | None:
    try:
        return workspace.find(stage, key, verify)
    except DamagedOutput as error:
        if logged:
            log.warning("stage %s is built again: %s", stage, error)
        return None


def _require_output(run: _Run) -> StageOutput:
    output = run.workspace.find(run.stage, run.key, run.verify)
    if output is None:
        raise RuntimeError(
            f"output {run.uri} vanished right after another writer committed it: expected it to "
            f"stay; "
            f"stop whoever deletes there and run the stage again."
        )
    return output


def _withdraw(run: _Run) -> None:
    """Take back an old commit, manifest first: what is left then counts as an aborted attempt."""
    manifest_uri = join(run.uri, MANIFEST_NAME)
    if files.exists(manifest_uri):
        files.delete(manifest_uri)
        # Its work folder is normally gone since the commit; a leftover must not shorten the
        # rebuild.
        files.delete_tree(join(run.uri, WORK_NAME))


def _commit(
    run: _Run, result: StageResult, fields: dict[str, Any], wall_s: float, lease: Lease
) -> StageOutput:
    """Verify the result, delete what it does not name, write the manifest last."""
    lease.renew()
    stale = _stale_files(run.uri, result)
    for name in stale:
        files.delete(join(run.uri, name))
    manifest = _manifest(run, result, fields, wall_s)
    content = files.encode_json(encode_manifest(manifest))
    lease.renew()
    uri = join(run.uri, MANIFEST_NAME)
    if not files.create_exclusive(uri, content) and files.read_bytes(uri) != content:
        raise RuntimeError(
            f"{uri} exists already: expected no other writer; run the stage again, it reuses that "
            f"output."
        )
    try:
        files.delete_tree(join(run.uri, WORK_NAME))
    except RuntimeError as error:
        log.warning("work folder of committed stage %s was not deleted: %s", run.stage, error)
    return StageOutput(uri=run.uri, manifest=decode_manifest(encode_manifest(manifest), run.uri))


def _stale_files(uri: str, result: StageResult) -> list[str]:
    sizes = files.list_sizes(uri)
    twice = [name for name, n in Counter(e.name for e in result.files).items() if n > 1]
    if twice:
        raise ValueError(f"the result names {twice} twice: expected each file once; fix the stage.")
    for entry in result.files:
        if sizes.get(entry.name) != entry.size_bytes:
            raise RuntimeError(
                f"{join(uri, entry.name)} has size {sizes.get(entry.name, 'none (missing)')}: "
                f"expected "
                f"{entry.size_bytes}, as the stage reported; run the stage again."
            )
    named = {e.name for e in result.files}
    kept = named | {MANIFEST_NAME}
    return [n for n in sizes if n not in kept and not n.startswith(f"{WORK_NAME}/")]


def _manifest(run: _Run, result: StageResult, fields: dict[str, Any], wall_s: float) -> Manifest:
    given = fields.get
    return Manifest(
        stage=run.stage,
        key=run.key,
        version=str(given("version", "")),
        config=dict(given("config") or {}),
        input_keys=dict(given("input_keys") or {}),
        files=tuple(sorted(result.files, key=lambda entry: entry.name)),
        metrics=finite_metrics(result.metrics),
        seed=given("seed"),
        code_digest=given("code_digest", ""),
        packages=installed_packages(),
        hardware=describe_hardware() | dict(given("hardware") or {}),
        wall_s=wall_s,
        device_hours=wall_s / 3600 * given("num_devices", 1),
        attempt=given("attempt", 1),
        run_ids={k: v for k, v in (given("run_ids") or {}).items() if v},
        created_at=datetime.now(UTC).isoformat(timespec="microseconds"),
    )
