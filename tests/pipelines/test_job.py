import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_graph import stages as fake

from drorae.config import to_json
from drorae.failure import Failure
from drorae.store.workspace import WORK_NAME, Workspace
from pipelines import attempt, job, stages
from pipelines.attempt import JobResult, JobSpec
from pipelines.launch import LocalLauncher, StageFailed, Stopped


@pytest.fixture
def spec(workspace: Path) -> JobSpec:
    return spec_of(workspace, fake.FakeJob())


def spec_of(workspace: Path, full: fake.FakeJob) -> JobSpec:
    stage = fake.TABLE[0]
    return JobSpec(
        workspace=str(workspace),
        stage="a",
        key=stages.stage_keys(full, fake.TABLE)["a"],
        version=1,
        entry=stage.entry,
        sections=stage.sections,
        config_type="fake_graph.stages:FakeJob",
        config=to_json(full),
        input_keys={},
        code_digest="d",
        run_ids={"prefect": "p", "mlflow": "m"},
    )


def run_in_process(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Any]:
    """Run the job's program in this process, whose signal handling stays as it is."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    uri = attempt.attempt_uri(spec, attempt.claim_attempt(spec))
    return job.main([uri]), attempt.read_outcome(uri)


def test_a_job_builds_once_and_records_where_it_came_from(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, outcome = run_in_process(spec, monkeypatch)
    assert (code, outcome.outcome) == (0, "built")
    manifest = Workspace(spec.workspace).find("a", spec.key, "sha256").manifest
    assert manifest.config == {"seed": 0, "a": to_json(fake.FakeStage())}
    assert manifest.run_ids == {"prefect": "p", "mlflow": "m"}
    assert (manifest.attempt, manifest.seed, manifest.code_digest) == (1, 0, "d")
    assert run_in_process(spec, monkeypatch)[1].outcome == "reused"
    assert run_in_process(replace(spec, force=True), monkeypatch)[1].outcome == "built"
    assert fake.built() == ["a", "a"]


def test_a_users_error_has_its_own_exit_code(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = fake.FakeStage(fail_attempts=9, user_error=True)
    code, outcome = run_in_process(spec_of(workspace, fake.FakeJob(a=bad)), monkeypatch)
    assert code == 2
    assert outcome == Failure(
        stage="a", type="ValueError", message="planned failure of a", is_final=True
    )


def test_another_error_can_be_tried_again(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = fake.FakeStage(fail_attempts=1)
    spec = spec_of(workspace, fake.FakeJob(a=bad))
    code, outcome = run_in_process(spec, monkeypatch)
    assert (code, outcome.is_final) == (1, False)
    assert run_in_process(spec, monkeypatch)[0] == 0


def test_an_input_that_vanished_is_named(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    code, outcome = run_in_process(replace(spec, input_keys={"z": "0"}), monkeypatch)
    assert code == 1
    assert "output of z (key 0) is not in" in outcome.message


@pytest.mark.parametrize(("text", "resumed_at"), [("x", 5), ("other", 0)])
def test_work_begun_from_an_input_that_was_built_again_otherwise_is_not_continued(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch, text: str, resumed_at: int
) -> None:
    run_in_process(spec, monkeypatch)
    full = fake.FakeJob(b=fake.FakeStage(fail_attempts=1))
    entry, sections = fake.TABLE[1].entry, fake.TABLE[1].sections
    follower = replace(spec, stage="b", key="kb", entry=entry, sections=sections)
    follower = replace(follower, config=to_json(full), input_keys={"a": spec.key})
    run_in_process(follower, monkeypatch)
    work = Path(Workspace(spec.workspace).stage_uri("b", "kb"), WORK_NAME)
    (work / "checkpoint").write_text("5")
    again = spec_of(Path(spec.workspace), fake.FakeJob(a=fake.FakeStage(text=text)))
    run_in_process(replace(again, key=spec.key, force=True), monkeypatch)
    assert run_in_process(follower, monkeypatch)[1].outcome == "built"
    steps = [event["step"] for event in fake.events() if event["event"] == "resume"]
    assert steps[-1] == resumed_at


def test_the_address_of_the_local_ray_is_awaited(
    spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(job.RAY_ADDRESS_PATH_VARIABLE, str(tmp_path / "address"))
    monkeypatch.setenv("RAY_ADDRESS", "")
    threading.Timer(0.3, (tmp_path / "address").write_text, ("127.0.0.1:1",)).start()
    assert run_in_process(spec, monkeypatch)[0] == 0


def test_a_local_ray_that_is_gone_is_an_error(
    spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(job.RAY_ADDRESS_PATH_VARIABLE, str(tmp_path / "gone" / "address"))
    code, outcome = run_in_process(spec, monkeypatch)
    assert code == 1
    assert "local Ray of this run did not start" in outcome.message


def launch(spec: JobSpec, tmp_path: Path, stop: threading.Event | None = None) -> tuple:
    seen: list[dict] = []
    launcher = LocalLauncher(tmp_path / "logs", stop or threading.Event())
    result = launcher.run(spec, uses_ray=False, on_progress=seen.append)
    launcher.close()
    return result, seen


def test_a_local_job_is_followed(workspace: Path, tmp_path: Path) -> None:
    slow = spec_of(workspace, fake.FakeJob(a=fake.FakeStage(sleep_s=4.0)))
    result, seen = launch(slow, tmp_path)
    assert isinstance(result, JobResult)
    assert result.outcome == "built"
    assert seen[0]["unit"] == "steps"


def test_a_local_failure_has_the_message_and_the_log(workspace: Path, tmp_path: Path) -> None:
    bad = fake.FakeStage(fail_attempts=9, user_error=True)
    with pytest.raises(StageFailed, match="stage a failed: planned failure of a") as failure:
        launch(spec_of(workspace, fake.FakeJob(a=bad)), tmp_path)
    assert "Traceback" in Path(failure.value.log_path).read_text()


def test_a_job_that_dies_without_a_word_is_explained(
    spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = tmp_path / "killer"
    killer.write_text("#!/bin/sh\necho last words\nkill -9 $$\n")
    killer.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killer))
    with pytest.raises(StageFailed, match=r"ended with signal 9.*last words"):
        launch(spec, tmp_path)


def test_stopping_ends_the_job_which_then_continues(workspace: Path, tmp_path: Path) -> None:
    slow = spec_of(workspace, fake.FakeJob(a=fake.FakeStage(sleep_s=6.0)))
    stop = threading.Event()

    def stop_after_a_checkpoint() -> None:
        marker = Path(Workspace(slow.workspace).stage_uri("a", slow.key)) / "_work" / "checkpoint"
        while not marker.exists():
            time.sleep(0.05)
        stop.set()

    threading.Thread(target=stop_after_a_checkpoint).start()
    with pytest.raises(Stopped):
        launch(slow, tmp_path, stop)
    assert launch(slow, tmp_path)[0].outcome == "built"
    resumes = [event["step"] for event in fake.events() if event["event"] == "resume"]
    assert resumes[0] == 0
    assert resumes[1] > 0


def test_sigterm_ends_a_job_with_143(workspace: Path) -> None:
    slow = spec_of(workspace, fake.FakeJob(a=fake.FakeStage(sleep_s=60.0)))
    uri = attempt.attempt_uri(slow, attempt.claim_attempt(slow))
    process = subprocess.Popen([sys.executable, "-m", "pipelines.job", uri])
    while not any(event["event"] == "resume" for event in fake.events()):
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 143
    assert not list((workspace / "leases").glob("*.json"))
