"""The store on a real S3 server: what differs from a local disk is only the address."""

import json
import multiprocessing
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

from drorae.checkpoint import TrainingCheckpoints
from drorae.store import files, s3, versioned
from drorae.store.context import StageContext, StageResult
from drorae.store.lease import acquire
from drorae.store.patience import patience
from drorae.store.stage_run import run_once
from drorae.store.workspace import DamagedOutput, Workspace

pytestmark = pytest.mark.slow


def test_small_and_multipart_files_read_back_with_their_digest(s3_uri, tmp_path):
    source = tmp_path / "large.bin"
    source.write_bytes(bytes(range(256)) * 4096 * 60)  # 60 MiB: two parts
    small = files.write_bytes(f"{s3_uri}/a/small.bin", b"abc")
    large = files.upload(source, f"{s3_uri}/a/large.bin")
    assert files.read_bytes(f"{s3_uri}/a/small.bin") == b"abc"
    assert files.sha256_of(f"{s3_uri}/a/large.bin") == large.sha256
    assert files.list_sizes(f"{s3_uri}/a") == {"large.bin": large.size_bytes, "small.bin": 3}
    assert small.size_bytes == files.size(f"{s3_uri}/a/small.bin") == 3


def test_failed_upload_publishes_nothing(s3_uri, tmp_path, monkeypatch):
    source = tmp_path / "file"
    source.write_bytes(b"1" * 100)
    monkeypatch.setattr(files, "CHUNK_BYTES", 10)

    class Broken(files._Hashed):
        def __iter__(self):
            yield b"half"
            raise RuntimeError("the disk broke")

    monkeypatch.setattr(files, "_Hashed", Broken)
    with pytest.raises(RuntimeError, match="the disk broke"):
        files.upload(source, f"{s3_uri}/file")
    assert not files.exists(f"{s3_uri}/file")
    assert files.list_files(s3_uri) == []


def test_a_file_written_in_pieces_is_hashed_and_published_only_whole(s3_uri):
    piece = bytes(range(256)) * 4096 * 20  # 20 MiB

    def save(target):
        for _ in range(3):  # two parts
            target.write(piece)

    entry = files.write_with(f"{s3_uri}/a/pieces.bin", save)
    assert entry.size_bytes == 3 * len(piece) == files.size(f"{s3_uri}/a/pieces.bin")
    assert files.sha256_of(f"{s3_uri}/a/pieces.bin") == entry.sha256

    def break_off(target):
        save(target)
        raise RuntimeError("the machine broke")

    with pytest.raises(RuntimeError, match="the machine broke"):
        files.write_with(f"{s3_uri}/a/torn.bin", break_off)
    assert files.list_files(s3_uri) == ["a/pieces.bin"]


def test_training_checkpoints_live_on_s3(s3_uri):
    def make():
        return TrainingCheckpoints(work_uri=s3_uri, every_steps=1, every_s=1e9, keep=2)

    checkpoints = make()
    for step in (1, 2, 3):
        weights = {"weights": torch.full((1000,), float(step))}
        checkpoints.save(step, weights, {"step": step})
    checkpoints.wait()
    folder = f"{s3_uri}/checkpoints"
    names = [f"step-{step:08d}.{end}" for step in (2, 3) for end in ("0.bin", "json", "pt")]
    assert files.list_files(folder) == names
    files.write_bytes(f"{folder}/step-00000003.0.bin", b"torn")
    found = {"weights": torch.zeros(1000)}
    assert make().restore(lambda: found) == {"step": 2}
    assert torch.equal(found["weights"], torch.full((1000,), 2.0))


def test_empty_file_and_missing_file(s3_uri, tmp_path):
    (tmp_path / "empty").touch()
    assert files.upload(tmp_path / "empty", f"{s3_uri}/empty").size_bytes == 0
    assert files.read_bytes(f"{s3_uri}/empty") == b""
    with pytest.raises(FileNotFoundError, match="missing"):
        files.read_bytes(f"{s3_uri}/missing")
    files.delete(f"{s3_uri}/missing")
    files.delete_tree(f"{s3_uri}/no-folder")
    assert files.list_files(f"{s3_uri}/no-folder") == []
    assert files.list_folders(f"{s3_uri}/no-folder") == []


def test_listing_is_fresh_after_another_client_wrote(s3_uri, s3_environment):
    assert files.list_files(f"{s3_uri}/x") == []
    s3_environment.client().pipe_file(f"{s3_uri}/x/new", b"1")
    assert files.list_files(f"{s3_uri}/x") == ["new"]
    assert files.exists(f"{s3_uri}/x/new")


def test_exclusive_creation_has_one_winner(s3_uri):
    results = _in_threads(
        8, lambda i: files.create_exclusive(f"{s3_uri}/one", f"writer {i}".encode())
    )
    assert sorted(results) == [False] * 7 + [True]


def test_conditional_replacement_has_one_winner(s3_uri):
    uri = f"{s3_uri}/swapped"
    files.write_bytes(uri, b"old")
    _, version = versioned.read_versioned(uri)
    results = _in_threads(
        8, lambda i: versioned.write_if_version(uri, f"writer {i}".encode(), version)
    )
    assert sorted(results) == [False] * 7 + [True]
    assert not versioned.write_if_version(f"{s3_uri}/missing", b"x", version)


def test_conditional_delete_leaves_a_changed_file(s3_uri):
    uri = f"{s3_uri}/file"
    files.write_bytes(uri, b"old")
    _, version = versioned.read_versioned(uri)
    versioned.delete_if_version(uri, version)
    assert not files.exists(uri)
    versioned.delete_if_version(uri, version)


def test_lease_is_taken_over_only_after_silence(s3_uri):
    uri = f"{s3_uri}/leases/a.json"
    with acquire(uri, "first", ttl_s=2) as first:
        started_s = time.monotonic()
        waited = acquire(
            uri, "second", 2, until=lambda: time.monotonic() - started_s > 4, poll_s=0.3
        )
        assert waited is None
        first.renew()
        assert first.owner.num_renewals >= 3
    with acquire(uri, "second", ttl_s=2) as second:
        assert second.owner.name == "second"
    assert not files.exists(uri)


def test_stage_is_built_once_reused_and_rebuilt_when_damaged(s3_uri, caplog):
    workspace = Workspace(s3_uri + "/team/project")
    workspace.check()
    context = StageContext(stage="shard", key="k1", output_uri=workspace.stage_uri("shard", "k1"))
    calls = []

    def build():
        calls.append(1)
        files.write_bytes(f"{context.work_uri}/done/part.json", b"{}")
        context.progress(1, 1, "images")
        entries = [
            context.put_bytes("train/part-00000.parquet", b"rows"),
            context.put_json("a", {}),
        ]
        return StageResult(files=entries, metrics={"rows": 4.0})

    assert run_once(workspace, "shard", "k1", build)[1] == "built"
    output, how = run_once(workspace, "shard", "k1", build)
    assert (how, len(calls)) == ("reused", 1)
    assert files.list_files(output.uri) == ["a", "manifest.json", "train/part-00000.parquet"]
    files.delete(output.uri_of("train/part-00000.parquet"))
    with pytest.raises(DamagedOutput, match=r"train/part-00000.parquet is missing"):
        workspace.find("shard", "k1")
    assert run_once(workspace, "shard", "k1", build)[1] == "built"
    assert "train/part-00000.parquet is missing" in caplog.text
    files.write_bytes(output.uri_of("train/part-00000.parquet"), b"ROWS")
    with pytest.raises(DamagedOutput, match="sha256 differs"):
        workspace.find("shard", "k1", verify="sha256")
    assert [m.key for m in workspace.outputs()] == ["k1"]


def test_local_copy_is_cached_and_verified(s3_uri, tmp_path, monkeypatch):
    monkeypatch.setenv("DRORAE_CACHE", str(tmp_path / "cache"))
    entry = files.write_bytes(f"{s3_uri}/file", b"content")
    copy = files.local_copy(f"{s3_uri}/file", sha256=entry.sha256)
    assert copy == tmp_path / "cache" / "objects" / entry.sha256
    files.delete(f"{s3_uri}/file")
    assert files.local_copy(f"{s3_uri}/file", sha256=entry.sha256).read_bytes() == b"content"
    with pytest.raises(FileNotFoundError, match="/file does not exist"):
        files.local_copy(f"{s3_uri}/file", tmp_path / "other", entry.sha256)
    files.write_bytes(f"{s3_uri}/file", b"changed")
    with pytest.raises(RuntimeError, match="changed or damaged"):
        files.local_copy(f"{s3_uri}/file", tmp_path / "other", entry.sha256)
    assert files.local_copy(f"{s3_uri}/file", tmp_path / "other").read_bytes() == b"changed"
    assert files.list_files(str(tmp_path / "other")) == [
        f"objects/{files.sha256_of(f'{s3_uri}/file')}"
    ]


def test_missing_bucket_is_one_clear_error(s3_environment):
    with pytest.raises(FileNotFoundError, match=r"bucket 'no-such-bucket' .* does not exist"):
        Workspace("s3://no-such-bucket/x").check()
    with pytest.raises(FileNotFoundError, match=r"bucket 'no-such-bucket' .* does not exist"):
        Workspace("s3://no-such-bucket/x").outputs()


@pytest.mark.parametrize(
    ("name", "value"), [("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "nobody")]
)
def test_wrong_credentials_are_one_clear_error(s3_uri, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="check AWS_ACCESS_KEY_ID"):
        Workspace(s3_uri).check()
    with pytest.raises(RuntimeError, match="check AWS_ACCESS_KEY_ID"):
        files.write_bytes(f"{s3_uri}/x", b"1")
    with pytest.raises(RuntimeError, match="check AWS_ACCESS_KEY_ID"):
        files.list_files(f"{s3_uri}/x")
    with pytest.raises(RuntimeError, match="check AWS_ACCESS_KEY_ID"):
        Workspace(s3_uri).find("shard", "k")


def test_endpoint_without_server_fails_fast(s3_uri, monkeypatch):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{reserved.getsockname()[1]}")
        started_s = time.monotonic()
        with pytest.raises(RuntimeError, match="did not answer"):
            Workspace(s3_uri).check()
        with patience(0), pytest.raises(RuntimeError, match="did not answer"):
            files.write_bytes(f"{s3_uri}/x", b"1")
    assert time.monotonic() - started_s < 30


def test_endpoint_that_drops_packets_fails_within_half_a_minute(s3_uri, monkeypatch):
    # A listener whose queue is full never completes a handshake, like a firewall that drops.
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        address = deaf.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{address[1]}")
        started_s = time.monotonic()
        with pytest.raises(RuntimeError, match="did not answer"):
            Workspace(s3_uri).check()
        assert time.monotonic() - started_s < 30
        for filler in fillers:
            filler.close()


def _build_in_process(workspace_uri: str, name: str, results: str) -> None:
    workspace = Workspace(workspace_uri)
    context = StageContext(stage="s", key="k", output_uri=workspace.stage_uri("s", "k"))

    def build():
        time.sleep(2)
        return StageResult(files=[context.put_bytes("file", name.encode())])

    output, how = run_once(workspace, "s", "k", build, poll_s=0.2)
    content = files.read_bytes(output.uri_of("file")).decode()
    Path(results, name).write_text(json.dumps([how, content]))


def test_two_processes_that_race_build_once(s3_uri, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    arguments = [(s3_uri, name, str(tmp_path)) for name in ("a", "b")]
    processes = [spawn.Process(target=_build_in_process, args=a) for a in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    (how_a, content_a), (how_b, content_b) = (
        json.loads((tmp_path / name).read_text()) for name in ("a", "b")
    )
    # The slower one reuses what it did not have to wait for.
    assert sorted([how_a, how_b]) in (["built", "waited"], ["built", "reused"])
    assert content_a == content_b


def test_client_follows_the_environment(s3_uri, monkeypatch):
    before = s3.filesystem()
    assert s3.filesystem() is before
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    assert s3.filesystem() is not before


def _in_threads(count: int, call) -> list:
    results: list = []
    threads = [threading.Thread(target=lambda i=i: results.append(call(i))) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
