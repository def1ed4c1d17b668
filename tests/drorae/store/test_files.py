import errno
import hashlib
import json
import os
import threading

import pytest
import torch

from drorae.store import atomic, files, versioned


def test_written_bytes_read_back_with_size_and_digest(tmp_path):
    uri = files.join(str(tmp_path), "a", "b.bin")
    entry = files.write_bytes(uri, b"content")
    assert entry == files.FileEntry(
        name="b.bin", size_bytes=7, sha256=hashlib.sha256(b"content").hexdigest()
    )
    assert files.read_bytes(uri) == b"content"
    assert files.size(uri) == 7
    assert files.sha256_of(uri) == entry.sha256
    assert files.exists(uri)
    assert not files.exists(str(tmp_path))


def test_a_file_written_in_pieces_is_hashed_and_replaces_an_older_one_only_whole(tmp_path):
    uri = str(tmp_path / "a" / "b.bin")
    files.write_bytes(uri, b"old")

    def break_off(target):
        target.write(b"new")
        raise RuntimeError("the disk broke")

    with pytest.raises(RuntimeError, match="the disk broke"):
        files.write_with(uri, break_off)
    assert files.read_bytes(uri) == b"old"
    entry = files.write_with(uri, lambda target: [target.write(b"ne"), target.write(b"w")])
    assert entry == files.FileEntry(
        name="b.bin", size_bytes=3, sha256=hashlib.sha256(b"new").hexdigest()
    )
    assert files.read_bytes(uri) == b"new"
    assert os.listdir(tmp_path / "a") == ["b.bin"]


def test_upload_hashes_while_copying(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 3)
    (tmp_path / "source").write_bytes(b"0123456789")
    entry = files.upload(tmp_path / "source", str(tmp_path / "target"))
    assert (entry.name, entry.size_bytes) == ("target", 10)
    assert entry.sha256 == hashlib.sha256(b"0123456789").hexdigest()
    assert (tmp_path / "target").read_bytes() == b"0123456789"


def test_missing_files_are_named(tmp_path):
    missing = str(tmp_path / "missing")
    for call in (files.read_bytes, files.size, files.read_json, files.sha256_of, files.local_copy):
        with pytest.raises(FileNotFoundError, match="missing does not exist: expected"):
            call(missing)
    with pytest.raises(FileNotFoundError, match="expected a file to copy"):
        files.upload(missing, str(tmp_path / "x"))
    files.delete(missing)
    files.delete_tree(missing)
    assert files.list_files(missing) == []
    assert files.list_folders(missing) == []


def test_json_round_trip_and_broken_json(tmp_path):
    uri = str(tmp_path / "a.json")
    files.write_json(uri, {"b": [1, 2.5], "a": None})
    assert files.read_json(uri) == {"a": None, "b": [1, 2.5]}
    files.write_bytes(uri, b"{half")
    with pytest.raises(ValueError, match=r"a.json holds no JSON"):
        files.read_json(uri)


def test_failing_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    uri = str(tmp_path / "file")
    files.write_bytes(uri, b"old")

    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(RuntimeError, match=r"no space left .* free some"):
        files.write_bytes(uri, b"new")
    with pytest.raises(RuntimeError, match="no space left"):
        files.create_exclusive(str(tmp_path / "other"), b"new")
    assert os.listdir(tmp_path) == ["file"]
    assert files.read_bytes(uri) == b"old"


def test_interrupted_write_leaves_nothing_behind(tmp_path):
    def chunks():
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic.replace(str(tmp_path / "file"), chunks())
    assert os.listdir(tmp_path) == []


def test_folder_that_is_a_file(tmp_path):
    files.write_bytes(str(tmp_path / "file"), b"")
    with pytest.raises(ValueError, match="is a file"):
        files.write_bytes(str(tmp_path / "file" / "below"), b"")
    with pytest.raises(ValueError, match="is a folder"):
        files.read_bytes(str(tmp_path))


def test_listing_is_relative_sorted_and_hides_unfinished_files(tmp_path):
    for name in ("b/2.bin", "a.bin", f".c{atomic.TEMPORARY_MARK}123"):
        files.write_bytes(files.join(str(tmp_path), name), b"12")
    assert files.list_files(str(tmp_path)) == ["a.bin", "b/2.bin"]
    assert list(files.list_sizes(str(tmp_path)).values()) == [2, 2, 2]
    assert files.list_folders(str(tmp_path)) == ["b"]
    assert files.list_folders(str(tmp_path / "a.bin")) == []
    files.delete_tree(str(tmp_path / "b"))
    assert files.list_files(str(tmp_path)) == ["a.bin"]


def test_join_keeps_the_scheme_and_single_slashes():
    assert files.join("s3://bucket/", "/a/", "b") == "s3://bucket/a/b"
    assert files.join("/tmp/x/", "") == "/tmp/x"


@pytest.mark.parametrize("has_hard_links", [True, False])
def test_exclusive_creation_has_one_winner(tmp_path, monkeypatch, has_hard_links):
    def refuse(source, target):
        raise OSError(errno.EPERM, "no hard links here")

    if not has_hard_links:
        monkeypatch.setattr(os, "link", refuse)
    uri = str(tmp_path / "one")
    results = in_threads(8, lambda i: files.create_exclusive(uri, f"writer {i}".encode()))
    assert sorted(results) == [False] * 7 + [True]
    assert os.listdir(tmp_path) == ["one"]


def test_exclusive_creation_reports_other_failures(tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(RuntimeError, match="broken disk"):
        files.create_exclusive(str(tmp_path / "one"), b"")


def test_conditional_replacement_has_one_winner(tmp_path):
    uri = str(tmp_path / "swapped")
    files.write_bytes(uri, b"old")
    _, version = versioned.read_versioned(uri)
    results = in_threads(
        8, lambda i: versioned.write_if_version(uri, f"writer {i}".encode(), version)
    )
    assert sorted(results) == [False] * 7 + [True]
    assert not versioned.write_if_version(str(tmp_path / "missing"), b"", version)


def test_conditional_delete_leaves_a_changed_file(tmp_path):
    uri = str(tmp_path / "file")
    files.write_bytes(uri, b"old")
    _, version = versioned.read_versioned(uri)
    files.write_bytes(uri, b"new")
    versioned.delete_if_version(uri, version)
    assert files.read_bytes(uri) == b"new"
    versioned.delete_if_version(uri, versioned.read_versioned(uri)[1])
    assert not files.exists(uri)


def test_local_file_is_its_own_local_copy(tmp_path):
    files.write_bytes(str(tmp_path / "file"), b"")
    assert files.local_copy(str(tmp_path / "file")) == tmp_path / "file"


def in_threads(count, call):
    results = []
    threads = [threading.Thread(target=lambda i=i: results.append(call(i))) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_full_disk_under_torch_save_is_named(tmp_path, monkeypatch):
    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "save", lambda path, save: save(Full()))
    with pytest.raises(OSError, match="No space left"):
        files.write_with(
            str(tmp_path / "x"), lambda target: torch.save({"w": torch.zeros(9)}, target)
        )


def test_json_names_the_number_that_it_cannot_hold() -> None:
    value = {"fid": {"cfg": [1.0, float("nan")]}}
    with pytest.raises(ValueError, match=r"fid\.cfg\.1=nan is not finite"):
        files.encode_json(value)


def test_a_row_of_a_log_holds_null_for_what_is_not_finite() -> None:
    row = {"step": 1, "loss": float("nan"), "psnr": float("inf"), "lr": 0.5}
    line = files.encode_log_row(row)
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "psnr": None,
        "lr": 0.5,
    }
    assert line.endswith(b"\n")
