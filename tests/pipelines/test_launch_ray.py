import threading
from dataclasses import replace
from enum import Enum
from pathlib import Path

import pytest

from drorae.config import Resources
from drorae.failure import Failure
from pipelines import attempt, launch_ray
from pipelines.attempt import JobResult, JobSpec
from pipelines.launch import StageFailed, Stopped
from pipelines.launch_ray import RayJobLauncher, submission_id


class Status(Enum):
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    FAILED = "FAILED"


class FakeCluster:
    """The part of the Jobs API that we use, in memory."""

    def __init__(self) -> None:
        self.jobs: dict[str, Status] = {}
        self.submitted: list[dict] = []
        self.on_submit = lambda name: None

    def submit_job(self, *, entrypoint: str, submission_id: str, **more: object) -> None:
        self.jobs[submission_id] = Status.RUNNING
        self.submitted.append({"entrypoint": entrypoint, "id": submission_id, **more})
        self.on_submit(submission_id)

    def get_job_status(self, name: str) -> Status:
        if name not in self.jobs:
            raise RuntimeError(f"Job {name} does not exist")
        return self.jobs[name]

    def stop_job(self, name: str) -> None:
        self.jobs[name] = Status.FAILED


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return JobSpec(
        workspace=str(tmp_path),
        stage="fusion",
        key="abc",
        version=1,
        entry="m:f",
        sections=(),
        config_type="m:C",
        config={},
        input_keys={},
        code_digest="",
        run_ids={},
    )


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    monkeypatch.setattr(launch_ray, "POLL_S", 0.01)
    monkeypatch.setattr(launch_ray, "STATUS_EVERY_S", 0.02)
    return FakeCluster()


@pytest.fixture
def launcher(cluster: FakeCluster) -> RayJobLauncher:
    environment = {"AWS_ENDPOINT_URL": "http://s3", "HOME": "/home"}
    launcher = RayJobLauncher("http://cluster:8265", threading.Event(), environment)
    launcher._connected = cluster
    return launcher


def run(launcher: RayJobLauncher, spec: JobSpec) -> JobResult:
    return launcher.run(spec, uses_ray=True, on_progress=lambda progress: None)


def finish(spec: JobSpec, number: int, outcome: JobResult | Failure) -> None:
    attempt.write_outcome(attempt.attempt_uri(spec, number), outcome)


RESULT = JobResult(outcome="built", uri="u")


def test_a_job_is_submitted_under_the_name_of_its_attempt(
    launcher: RayJobLauncher, cluster: FakeCluster, spec: JobSpec
) -> None:
    cluster.on_submit = lambda name: finish(spec, 1, RESULT)
    assert run(launcher, spec) == RESULT
    job = cluster.submitted[0]
    assert job["id"] == "fusion-abc-a1"
    assert job["entrypoint"].endswith("/jobs/fusion/abc/a1")
    variables = job["runtime_env"]["env_vars"]
    assert variables["AWS_ENDPOINT_URL"] == "http://s3"
    assert variables["DRORAE_RAY_JOB_ID"] == "fusion-abc-a1"
    assert "HOME" not in variables


def test_a_driver_takes_what_the_stage_table_says_of_the_head(
    launcher: RayJobLauncher, cluster: FakeCluster, spec: JobSpec
) -> None:
    cluster.on_submit = lambda name: finish(spec, 1, RESULT)
    run(launcher, replace(spec, driver=Resources(cpus=0.5, memory_bytes=1 << 30)))
    job = cluster.submitted[0]
    assert job["entrypoint_num_cpus"] == 0.5
    assert job["entrypoint_num_gpus"] == 0
    assert job["entrypoint_memory"] == 1 << 30
    assert list(job["entrypoint_resources"]) == ["node:__internal_head__"]


def test_a_running_job_is_followed_not_started_again(
    launcher: RayJobLauncher, cluster: FakeCluster, spec: JobSpec
) -> None:
    attempt.claim_attempt(spec)
    cluster.jobs[submission_id(spec, 1)] = Status.RUNNING
    threading.Timer(0.05, finish, (spec, 1, RESULT)).start()
    assert run(launcher, spec) == RESULT
    assert cluster.submitted == []


def test_after_a_bad_end_the_next_attempt_is_submitted(
    launcher: RayJobLauncher, cluster: FakeCluster, spec: JobSpec
) -> None:
    attempt.claim_attempt(spec)
    cluster.jobs[submission_id(spec, 1)] = Status.FAILED
    cluster.on_submit = lambda name: finish(spec, 2, RESULT)
    assert run(launcher, spec) == RESULT
    assert cluster.submitted[0]["id"] == "fusion-abc-a2"


def test_a_job_that_dies_without_a_word_is_an_error_to_retry(
    launcher: RayJobLauncher, cluster: FakeCluster, spec: JobSpec
) -> None:
    cluster.on_submit = lambda name: cluster.jobs.update({name: Status.FAILED})
    with pytest.raises(StageFailed, match="status FAILED and left no result") as failure:
        run(launcher, spec)
    assert not failure.value.error.is_final


def test_a_cluster_that_forgot_the_job_is_an_error(
    launcher: RayJobLauncher,
    cluster: FakeCluster,
    spec: JobSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch_ray, "LOST_AFTER_S", 0.1)
    cluster.on_submit = lambda name: cluster.jobs.clear()
    with pytest.raises(StageFailed, match="status unknown"):
        run(launcher, spec)


def test_a_cluster_whose_agent_is_not_up_yet_is_asked_again(
    launcher: RayJobLauncher, cluster: FakeCluster, spec: JobSpec
) -> None:
    def refuse(name: str) -> None:
        cluster.on_submit = lambda name: finish(spec, 1, RESULT)
        cluster.jobs.clear()
        raise RuntimeError("No available agent to submit job, please try again later.")

    cluster.on_submit = refuse
    assert run(launcher, spec) == RESULT
    assert [job["id"] for job in cluster.submitted] == ["fusion-abc-a1"] * 2


def test_a_lost_answer_does_not_submit_twice(
    launcher: RayJobLauncher, cluster: FakeCluster, spec: JobSpec
) -> None:
    def lose(name: str) -> None:
        finish(spec, 1, RESULT)
        raise ConnectionError("reset")

    cluster.on_submit = lose
    assert run(launcher, spec) == RESULT
    assert len(cluster.submitted) == 1


def test_a_cluster_that_takes_no_jobs_is_an_error(
    launcher: RayJobLauncher,
    cluster: FakeCluster,
    spec: JobSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(name: str) -> None:
        cluster.jobs.clear()
        raise RuntimeError("No available agent")

    monkeypatch.setattr(launch_ray, "SUBMIT_FOR_S", 0.05)
    cluster.on_submit = refuse
    with pytest.raises(RuntimeError, match="did not take job fusion-abc-a1: No available agent"):
        run(launcher, spec)


@pytest.mark.parametrize("status", [Status.PENDING, Status.RUNNING])
def test_a_job_that_the_head_has_no_room_for_is_told_once_and_waited_for(
    launcher: RayJobLauncher,
    cluster: FakeCluster,
    spec: JobSpec,
    status: Status,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(launch_ray, "PENDING_S", 0.05)
    cluster.on_submit = lambda name: cluster.jobs.update({name: status})
    threading.Timer(0.5, finish, (spec, 1, RESULT)).start()
    told: list[dict] = []
    spec = replace(spec, driver=Resources(cpus=0.5, memory_bytes=3 << 29))
    assert launcher.run(spec, uses_ray=True, on_progress=told.append) == RESULT
    asked = "asks for 0.5 CPUs, 0 GPUs and 1.5 GiB of memory"
    times = 1 if status is Status.PENDING else 0
    assert caplog.text.count(asked) == len(told) == times
    assert all(asked in progress["message"] for progress in told)
    assert caplog.text.count("--memory of `ray start`") == times


def test_stopping_the_run_stops_the_job(
    launcher: RayJobLauncher, cluster: FakeCluster, spec: JobSpec
) -> None:
    cluster.on_submit = lambda name: launcher._stop.set()
    with pytest.raises(Stopped):
        run(launcher, spec)
    assert cluster.jobs == {"fusion-abc-a1": Status.FAILED}
    launcher.close()


def test_a_cluster_that_does_not_answer_is_named(spec: JobSpec) -> None:
    pytest.importorskip("ray.job_submission")
    launcher = RayJobLauncher("http://127.0.0.1:1", threading.Event(), {})
    with pytest.raises(RuntimeError, match=r"Ray cluster at http://127\.0\.0\.1:1 does not answer"):
        run(launcher, spec)
