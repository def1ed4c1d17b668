from pathlib import Path

import pytest

from drorae.store import files
from drorae.store.context import StageContext, StageResult
from drorae.store.files import join
from drorae.store.stage_run import run_once
from drorae.store.stage_work import INPUTS_NAME, drop_work_of_other_inputs
from drorae.store.workspace import StageOutput, Workspace


def input_with(workspace: Workspace, content: bytes) -> StageOutput:
    """The output of the one input, built again under its key."""
    ctx = StageContext(stage="shard", key="k", output_uri=workspace.stage_uri("shard", "k"))

    def build() -> StageResult:
        return StageResult(files=[ctx.put_bytes("part", content)])

    return run_once(workspace, "shard", "k", build, force=True)[0]


def attempt(workspace: Workspace, content: bytes) -> list[str]:
    """Begin the follower over the input with that content; returns what lies in its work folder."""
    ctx = StageContext(
        stage="fusion",
        key="f",
        output_uri=workspace.stage_uri("fusion", "f"),
        inputs={"shard": input_with(workspace, content)},
    )
    drop_work_of_other_inputs(ctx)
    found = files.list_files(ctx.work_uri)
    files.write_bytes(join(ctx.work_uri, "checkpoints", "step-5"), b"weights")
    return found


def test_work_stays_while_an_input_has_the_same_bytes(tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path))
    assert attempt(workspace, b"old") == [INPUTS_NAME]
    assert attempt(workspace, b"old") == ["checkpoints/step-5", INPUTS_NAME]


def test_work_of_an_input_that_was_built_again_otherwise_is_dropped_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workspace = Workspace(str(tmp_path))
    attempt(workspace, b"old")
    assert attempt(workspace, b"new") == [INPUTS_NAME]
    assert "fusion starts afresh: shard was built again" in caplog.text
    assert attempt(workspace, b"new") == ["checkpoints/step-5", INPUTS_NAME]


def test_a_stage_without_inputs_notes_nothing(tmp_path: Path) -> None:
    ctx = StageContext(stage="shard", key="k", output_uri=str(tmp_path / "shard"))
    drop_work_of_other_inputs(ctx)
    assert files.list_files(ctx.work_uri) == []
