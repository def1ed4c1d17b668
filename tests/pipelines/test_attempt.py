import errno
from pathlib import Path

import pytest

from pipelines import attempt
from pipelines.attempt import JobError, JobResult, JobSpec


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return JobSpec(
        workspace=str(tmp_path),
        stage="fusion",
        key="abc",
        version=1,
        entry="m:f",
        sections=("seed",),
        config_type="m:C",
        config={"seed": 0},
        input_keys={"shard": "123"},
        code_digest="d",
        run_ids={"prefect": "p"},
    )


def test_attempts_are_numbered_and_read_back(spec: JobSpec) -> None:
    assert attempt.last_attempt(spec) == 0
    assert [attempt.claim_attempt(spec) for _ in range(11)] == list(range(1, 12))
    assert attempt.last_attempt(spec) == 11
    assert attempt.read_spec(attempt.attempt_uri(spec, 11)) == (spec, 11)


def test_outcomes_are_read_back(spec: JobSpec) -> None:
    uri = attempt.attempt_uri(spec, attempt.claim_attempt(spec))
    assert attempt.read_outcome(uri) is None
    error = JobError(stage="fusion", type="ValueError", message="m", is_user_error=True)
    attempt.write_outcome(uri, error)
    assert attempt.read_outcome(uri) == error
    result = JobResult(outcome="built", uri="u")
    attempt.write_outcome(uri, result)
    assert attempt.read_outcome(uri) == result


class Wrapped(RuntimeError):
    def __init__(self, cause: Exception):
        super().__init__("wrapper")
        self.cause = cause


class Group(RuntimeError):
    def __init__(self, failures: dict[int, Exception]):
        super().__init__("group")
        self.worker_failures = failures


@pytest.mark.parametrize(
    ("error", "message", "is_user_error"),
    [
        (ValueError("bad\nvalue"), "bad value", True),
        (FileNotFoundError("no file"), "no file", True),
        (RuntimeError("later"), "later", False),
        (OSError(errno.ENOSPC, "No space left"), "[Errno 28] No space left", True),
        (OSError(errno.EIO, "bad disk"), "[Errno 5] bad disk", False),
        (Wrapped(ValueError("inside")), "inside", True),
        (Group({0: Wrapped(ValueError("deep"))}), "deep", True),
        (KeyboardInterrupt(), "KeyboardInterrupt", False),
    ],
)
def test_errors_become_one_line(error: BaseException, message: str, is_user_error: bool) -> None:
    described = attempt.describe_error("fusion", error)
    assert described.message == message
    assert described.is_user_error is is_user_error


def test_a_full_disk_behind_another_error_is_the_users() -> None:
    error = RuntimeError("write failed")
    error.__cause__ = OSError(errno.ENOSPC, "No space left")
    assert attempt.describe_error("fusion", error).is_user_error
