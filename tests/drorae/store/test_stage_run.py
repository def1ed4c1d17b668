import json
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from drorae.store import files
from drorae.store.context import StageContext, StageResult
from drorae.store.files import join
from drorae.store.lease_owner import encode_owner, new_owner
from drorae.store.manifest import MANIFEST_NAME
from drorae.store.stage_run import run_once
from drorae.store.workspace import Workspace


class Stage:
    """Builds one file; counts how often."""

    def __init__(self, workspace, content=b"content", before=lambda: None):
        self.context = StageContext(stage="s", key="k", output_uri=workspace.stage_uri("s", "k"))
        self.content = content
        self.before = before
        self.num_built = 0

    def __call__(self):
        self.num_built += 1
        files.write_bytes(join(self.context.work_uri, "done", "a.json"), b"{}")
        self.before()
        return StageResult(files=[self.context.put_bytes("a/file", self.content)], metrics={"m": 1})


@pytest.fixture
def workspace(tmp_path):
    return Workspace(str(tmp_path))


def test_stage_is_built_once_and_then_reused(workspace):
    stage = Stage(workspace)
    output, how = run_once(workspace, "s", "k", stage)
    assert how == "built"
    assert files.list_files(output.uri) == ["a/file", MANIFEST_NAME]
    assert run_once(workspace, "s", "k", stage) == (output, "reused")
    assert stage.num_built == 1
    assert files.list_files(join(workspace.uri, "leases")) == [".lock"]


def test_manifest_records_where_the_output_came_from(workspace):
    fields = {
        "version": 3,
        "config": {"lr": 0.1},
        "input_keys": {"shard": "abc"},
        "seed": 5,
        "code_digest": "ff",
        "attempt": 2,
        "run_ids": {"prefect": "run-1", "ray": None},
        "hardware": {"gpus": ["H100"]},
        "num_devices": 2,
    }
    manifest = run_once(workspace, "s", "k", Stage(workspace), manifest_fields=fields)[0].manifest
    assert (manifest.version, manifest.config, manifest.seed) == ("3", {"lr": 0.1}, 5)
    assert manifest.run_ids == {"prefect": "run-1"}
    assert manifest.hardware["gpus"] == ["H100"]
    assert manifest.hardware["cores"] >= 1
    assert manifest.device_hours == pytest.approx(manifest.wall_s / 3600 * 2)
    assert manifest.metrics == {"m": 1.0}
    assert workspace.uri not in json.dumps(
        files.read_json(join(workspace.stage_uri("s", "k"), MANIFEST_NAME))
    )
    with pytest.raises(ValueError, match=r"\['sed'\]: expected only"):
        run_once(workspace, "s", "k2", Stage(workspace), manifest_fields={"sed": 1})


@pytest.mark.parametrize("damage", [files.delete, lambda uri: files.write_bytes(uri, b"x")])
def test_damaged_output_is_built_again_and_the_file_named(workspace, caplog, damage):
    output, _ = run_once(workspace, "s", "k", Stage(workspace))
    damage(output.uri_of("a/file"))
    again, how = run_once(workspace, "s", "k", Stage(workspace))
    assert how == "built"
    assert files.read_bytes(again.uri_of("a/file")) == b"content"
    assert "a/file" in caplog.text


def test_damage_is_withdrawn_before_the_rebuild(workspace):
    output, _ = run_once(workspace, "s", "k", Stage(workspace))
    files.delete(output.uri_of("a/file"))
    seen = []
    stage = Stage(workspace, before=lambda: seen.append(files.list_files(output.uri)))
    run_once(workspace, "s", "k", stage)
    assert seen == [["_work/done/a.json"]]


def test_forced_stage_is_built_again(workspace):
    run_once(workspace, "s", "k", Stage(workspace))
    output, how = run_once(workspace, "s", "k", Stage(workspace, b"newer"), force=True)
    assert how == "built"
    assert files.read_bytes(output.uri_of("a/file")) == b"newer"


def test_files_of_an_aborted_attempt_do_not_count(workspace):
    uri = workspace.stage_uri("s", "k")
    files.write_bytes(join(uri, "old/file"), b"old")
    files.write_bytes(join(uri, ".a.tmp-123"), b"half")
    output, _ = run_once(workspace, "s", "k", Stage(workspace))
    assert list(files.list_sizes(output.uri)) == ["a/file", MANIFEST_NAME]


def test_failed_attempt_keeps_its_work_and_frees_the_lease(workspace):
    def fail():
        raise ZeroDivisionError("the stage broke")

    with pytest.raises(ZeroDivisionError):
        run_once(workspace, "s", "k", Stage(workspace, before=fail))
    assert workspace.find("s", "k") is None
    kept = []
    stage = Stage(workspace)
    work_uri = stage.context.work_uri
    stage.before = lambda: kept.extend(files.list_files(work_uri))
    assert run_once(workspace, "s", "k", stage)[1] == "built"
    assert kept == ["done/a.json"]


def test_result_that_names_a_missing_file_is_not_committed(workspace):
    stage = Stage(workspace)

    def build():
        result = stage()
        files.delete(join(stage.context.output_uri, "a/file"))
        return result

    with pytest.raises(RuntimeError, match=r"a/file has size none \(missing\): expected 7"):
        run_once(workspace, "s", "k", build)
    assert workspace.find("s", "k") is None


def test_result_that_names_a_file_twice_is_not_committed(workspace):
    stage = Stage(workspace)

    def build():
        result = stage()
        return replace(result, files=result.files * 2)

    with pytest.raises(ValueError, match="twice"):
        run_once(workspace, "s", "k", build)


def test_writer_that_lost_its_lease_may_not_commit(workspace):
    other = replace(new_owner("the other", 30), machine="another boot")
    lease_uri = workspace.lease_uri("s", "k")
    stage = Stage(workspace, before=lambda: files.write_bytes(lease_uri, encode_owner(other)))
    with pytest.raises(RuntimeError, match=r"is lost: .*the other"):
        run_once(workspace, "s", "k", stage)
    assert workspace.find("s", "k") is None


def test_manifest_of_another_writer_is_never_replaced(workspace):
    manifest_uri = join(workspace.stage_uri("s", "k"), MANIFEST_NAME)
    stage = Stage(workspace, before=lambda: files.write_bytes(manifest_uri, b"{}"))
    with pytest.raises(RuntimeError, match="expected no other writer"):
        run_once(workspace, "s", "k", stage)
    assert files.read_bytes(manifest_uri) == b"{}"


@pytest.mark.parametrize("force", [False, True])
def test_racing_runs_build_once(workspace, force):
    if force:
        run_once(workspace, "s", "k", Stage(workspace))
    stage = Stage(workspace, before=lambda: time.sleep(0.5))
    told, results = [], []

    def run():
        results.append(
            run_once(workspace, "s", "k", stage, on_wait=told.append, force=force, poll_s=0.05)
        )

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stage.num_built == 1
    assert sorted(how for _, how in results) == ["built", "waited", "waited", "waited"]
    assert all(output == results[0][0] for output, _ in results)
    assert {owner.name for owner in told} <= {"stage s"}


def test_waiter_builds_when_the_first_writer_fails(workspace):
    started = threading.Event()

    def fail():
        started.set()
        time.sleep(0.3)
        raise ZeroDivisionError

    def first():
        with pytest.raises(ZeroDivisionError):
            run_once(workspace, "s", "k", Stage(workspace, before=fail))

    thread = threading.Thread(target=first)
    thread.start()
    started.wait()
    assert run_once(workspace, "s", "k", Stage(workspace), poll_s=0.05)[1] == "built"
    thread.join()


def _build_forever(uri: str, mark: str) -> None:
    workspace = Workspace(uri)

    def hang():
        Path(mark).touch()
        time.sleep(600)

    run_once(workspace, "s", "k", Stage(workspace, before=hang))


def test_killed_writer_is_replaced_at_once(workspace, tmp_path):
    mark = tmp_path / "building"
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=_build_forever, args=(workspace.uri, str(mark)))
    process.start()
    while not mark.exists():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    started_s = time.monotonic()
    assert run_once(workspace, "s", "k", Stage(workspace), poll_s=0.05)[1] == "built"
    assert time.monotonic() - started_s < 5
