import os
from dataclasses import replace
from pathlib import Path

import pytest

from drorae.store import files
from drorae.store.context import StageContext, StageResult
from drorae.store.manifest import MANIFEST_NAME, DamagedOutput
from drorae.store.stage_run import run_once
from drorae.store.workspace import StageOutput, Workspace


@pytest.fixture
def workspace(tmp_path):
    return Workspace(str(tmp_path / "runs"))


def built(workspace, stage="shard", key="k1") -> StageOutput:
    context = StageContext(stage=stage, key=key, output_uri=workspace.stage_uri(stage, key))

    def build():
        entries = [context.put_bytes(f"train/part-0000{i}.parquet", b"x" * 10) for i in range(2)]
        return StageResult(files=[*entries, context.put_json("counts.json", {"rows": 2})])

    return run_once(workspace, stage, key, build)[0]


def test_address_is_absolute_and_checked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Workspace("runs").uri == str(tmp_path / "runs")
    assert Workspace(f"file://{tmp_path}/runs/").uri == str(tmp_path / "runs")
    assert Workspace("s3://bucket/team/").uri == "s3://bucket/team"
    for wrong in ("", "gs://bucket/x", "s3://"):
        with pytest.raises(ValueError, match=r"expected (a folder or )?s3://bucket/prefix"):
            Workspace(wrong)


def test_check_passes_on_a_new_folder_and_leaves_nothing(workspace):
    workspace.check()
    assert os.listdir(workspace.uri) == []


def test_check_refuses_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file: expected a folder"):
        Workspace(str(tmp_path / "file")).check()
    with pytest.raises(ValueError, match="is a file: expected a folder"):
        Workspace(str(tmp_path / "file" / "below")).check()


def test_check_refuses_a_folder_that_cannot_be_written():
    with pytest.raises((RuntimeError, FileNotFoundError), match="/proc/nobody"):
        Workspace("/proc/nobody").check()


def test_output_gives_its_files(workspace):
    built(workspace)
    output = workspace.find("shard", "k1", verify="sha256")
    assert output.key == "k1"
    assert output.names() == ["counts.json", "train/part-00000.parquet", "train/part-00001.parquet"]
    assert output.names("train/", ".parquet") == output.names()[1:]
    assert output.read_json("counts.json") == {"rows": 2}
    assert output.local("counts.json") == Path(output.uri, "counts.json")
    with pytest.raises(FileNotFoundError, match=r"nothing.bin is no file of output .*counts.json"):
        output.uri_of("nothing.bin")


def test_nothing_is_found_before_the_manifest(workspace):
    assert workspace.find("shard", "k1") is None
    files.write_bytes(files.join(workspace.stage_uri("shard", "k1"), "counts.json"), b"{}")
    assert workspace.find("shard", "k1") is None
    assert workspace.outputs() == []


def test_damage_names_every_file(workspace):
    output = built(workspace)
    files.delete(output.uri_of("train/part-00001.parquet"))
    files.write_bytes(output.uri_of("train/part-00000.parquet"), b"x" * 12)
    files.write_bytes(output.uri_of("counts.json"), b'{\n "rows": 3\n}\n')
    with pytest.raises(DamagedOutput) as caught:
        workspace.find("shard", "k1", verify="sha256")
    assert caught.value.problems == (
        "counts.json: sha256 differs",
        "train/part-00000.parquet has size 12, manifest says 10",
        "train/part-00001.parquet is missing",
    )
    assert workspace.find("shard", "k1", verify="none") is not None


@pytest.mark.parametrize(("content", "text"), [(b"{", "is no JSON"), (b"{}", "is not readable")])
def test_broken_manifest_is_damage(workspace, caplog, content, text):
    output = built(workspace)
    files.write_bytes(files.join(output.uri, MANIFEST_NAME), content)
    with pytest.raises(DamagedOutput, match=text):
        workspace.find("shard", "k1")
    assert workspace.outputs() == []
    assert text in caplog.text


def test_outputs_lists_all_that_is_committed(workspace):
    built(workspace, "shard", "k1")
    built(workspace, "fusion", "k2")
    assert [(m.stage, m.key) for m in workspace.outputs()] == [("fusion", "k2"), ("shard", "k1")]


def test_log_lies_in_the_workspace_or_in_the_cache(workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("DRORAE_CACHE", str(tmp_path / "cache"))
    local = workspace.log_path("shard", "k1", 2)
    assert local == Path(workspace.uri, "logs/shard/k1/attempt-2.log")
    assert local.parent.is_dir()
    remote = Workspace("s3://bucket/x").log_path("shard", "k1", 1)
    assert remote.is_relative_to(tmp_path / "cache")
    assert remote.parent.is_dir()


def test_moved_workspace_still_holds_its_outputs(workspace, tmp_path):
    output = built(workspace)
    os.rename(workspace.uri, tmp_path / "moved")
    moved = Workspace(str(tmp_path / "moved")).find("shard", "k1", verify="sha256")
    assert moved == replace(output, uri=moved.uri)
