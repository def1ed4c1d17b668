from pathlib import Path

import pytest

from drorae.failure import Failure
from pipelines import attempt
from pipelines.attempt import JobResult, JobSpec


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
    error = Failure(stage="fusion", type="ValueError", message="m", is_final=True)
    attempt.write_outcome(uri, error)
    assert attempt.read_outcome(uri) == error
    result = JobResult(outcome="built", uri="u")
    attempt.write_outcome(uri, result)
    assert attempt.read_outcome(uri) == result
