import errno
import os

import pytest

from drorae.store import context as context_module
from drorae.store import files
from drorae.store.context import StageContext


@pytest.fixture
def context(tmp_path):
    return StageContext(stage="shard", key="k", output_uri=str(tmp_path / "out"))


def test_files_are_named_relative_to_the_output(context, tmp_path):
    (tmp_path / "local.bin").write_bytes(b"123")
    entries = [
        context.put_bytes("train/a.bin", b"1"),
        context.put_json("config.json", {"a": 1}),
        context.put_file("weights/b.bin", tmp_path / "local.bin"),
    ]
    assert [e.name for e in entries] == ["train/a.bin", "config.json", "weights/b.bin"]
    assert files.list_sizes(context.output_uri) == {e.name: e.size_bytes for e in entries}


@pytest.mark.parametrize(
    "name", ["", "/abs", "a//b", "../up", "a/../b", "_work/x", "manifest.json", "./a"]
)
def test_name_outside_the_output_is_refused(context, name):
    with pytest.raises(ValueError, match="expected a relative path"):
        context.put_bytes(name, b"")


def test_progress_is_throttled_and_tells_rate_and_rest(context, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(context_module.time, "monotonic", lambda: clock[0])
    uri = files.join(context.work_uri, "progress.json")
    context.progress(50, 100, "images")
    assert files.read_json(uri)["rate_per_s"] is None
    clock[0] += 1
    context.progress(60, 100, "images")
    assert files.read_json(uri)["done"] == 50
    clock[0] += 1
    context.progress(70, 100, "images", message="halfway", loss=0.5)
    record = files.read_json(uri)
    assert (record["done"], record["rate_per_s"], record["eta_s"]) == (70, 10.0, 3.0)
    assert (record["message"], record["loss"], record["stage"]) == ("halfway", 0.5, "shard")
    clock[0] += 0.1
    context.progress(100, 100, "images")
    assert files.read_json(uri)["done"] == 100


def test_notes_are_logged_and_come_with_all_later_progress(context, caplog):
    uri = files.join(context.work_uri, "progress.json")
    context.progress(50, 100, "images")
    context.note("2 classes")
    context.note("flat", is_warning=True)
    for done in (51, 52, 100):
        context.progress(done, 100, "images")
        assert files.read_json(uri)["notes"] == ["2 classes", "warning: flat"]
    assert "flat" in caplog.text


def test_progress_that_cannot_be_written_does_not_stop_the_stage(context, monkeypatch, caplog):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", fail)
    context.progress(1, 2, "images")
    assert "was not written" in caplog.text
