import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from drorae import checkpoint, checkpoint_format
from drorae.checkpoint import Snapshot, TrainingCheckpoints, load_weights, weights_bytes
from drorae.failure import Fatal
from drorae.store import atomic, files


def make(folder: Path, keep: int = 2, **more: Any) -> TrainingCheckpoints:
    return TrainingCheckpoints(
        work_uri=str(folder), every_steps=5, every_s=3600.0, keep=keep, **more
    )


def tensors(step: int = 0) -> dict[str, Tensor]:
    """Of several types and shapes, with content that tells the step."""
    return {
        "w": torch.full((8, 8), float(step)),
        "half": torch.full((3,), float(step), dtype=torch.bfloat16),
        "flag": torch.tensor([True, False, step % 2 == 0]),
        "count": torch.tensor(step),
        "none": torch.zeros(0, 4),
    }


def start_save(checkpoints: TrainingCheckpoints, step: int) -> None:
    checkpoints.save(step, tensors(step), {"step": step, "history": [{"a": float("nan")}]})


def save(checkpoints: TrainingCheckpoints, *steps: int) -> None:
    for step in steps:
        start_save(checkpoints, step)
    checkpoints.wait()


def restored(checkpoints: TrainingCheckpoints) -> int | None:
    """The step that a loop would continue from, with the tensors of that step; None: none."""
    found = tensors()
    small = checkpoints.restore(lambda: found)
    expected = tensors(0 if small is None else small["step"])
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    return None if small is None else small["step"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def files_of(*steps: int) -> list[str]:
    return [f"step-{step:08d}.{end}" for step in steps for end in ("0.bin", "json", "pt")]


def test_the_newest_checkpoint_is_chosen_and_old_ones_are_deleted(tmp_path: Path) -> None:
    checkpoints = make(tmp_path)
    assert restored(checkpoints) is None
    save(checkpoints, 5, 10, 15)
    assert restored(make(tmp_path)) == 15
    assert names(tmp_path) == files_of(10, 15)


def test_milestones_are_kept_and_saved_between_the_others(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, keep_every_steps=8)
    assert [s for s in range(1, 17) if checkpoints.due(s)] == [5, 8, 10, 15, 16]
    save(checkpoints, 5, 8, 10, 15, 16, 20)
    assert names(tmp_path) == files_of(8, 16, 20)


def test_a_torn_or_unmarked_checkpoint_is_never_chosen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = make(tmp_path, keep=5)
    save(checkpoints, 5, 10, 15, 20, 25)
    folder = tmp_path / "checkpoints"
    (folder / "step-00000025.json").unlink()
    (folder / "step-00000020.json").write_text('{"step": 2')
    torn = folder / "step-00000015.0.bin"
    torn.write_bytes(torn.read_bytes()[:-1] + b"x")
    (folder / "step-00000010.pt").unlink()
    assert restored(checkpoints) == 5
    for name in ("step-00000020.json", "step-00000015.0.bin", "step-00000010.pt"):
        assert f"{name} is left out" in caplog.text
    assert "step-00000025" not in caplog.text


@pytest.mark.parametrize("file", ["step-00000010.pt", "step-00000010.0.bin"])
def test_whatever_byte_is_lost_or_changed_the_one_before_is_chosen(
    tmp_path: Path, file: str
) -> None:
    save(make(tmp_path), 5, 10)
    path = tmp_path / "checkpoints" / file
    data = path.read_bytes()
    draw = random.Random(0)
    for offset in [0, len(data) - 1, *(draw.randrange(len(data)) for _ in range(48))]:
        for damaged in (
            data[:offset],
            data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :],
        ):
            path.write_bytes(damaged)
            assert restored(make(tmp_path)) == 5


def test_no_tensor_is_changed_without_an_intact_checkpoint(tmp_path: Path) -> None:
    save(make(tmp_path), 5)
    (tmp_path / "checkpoints" / "step-00000005.pt").write_bytes(b"torn")
    assert restored(make(tmp_path)) is None


def test_checkpoints_of_another_format_or_of_other_tensors_are_refused(tmp_path: Path) -> None:
    save(make(tmp_path), 5)
    with pytest.raises(Fatal, match=r"w has the shape \(8, 8\) in the .* and \(9,\) in the model"):
        make(tmp_path).restore(lambda: tensors() | {"w": torch.zeros(9)})
    with pytest.raises(Fatal, match=r"more has the shape None in the checkpoint"):
        make(tmp_path).restore(lambda: tensors() | {"more": torch.zeros(9)})
    with pytest.raises(Fatal, match=r"w has the dtype torch.float32 in the .* and torch.float16"):
        make(tmp_path).restore(lambda: tensors() | {"w": torch.zeros(8, 8, dtype=torch.half)})
    marker = tmp_path / "checkpoints" / "step-00000005.json"
    marker.write_text(marker.read_text().replace('"format":3', '"format":99'))
    with pytest.raises(Fatal, match="has format 99: expected 3"):
        restored(make(tmp_path))
    marker.write_text('{"step": 5, "size_bytes": 9, "sha256": "ab"}')
    with pytest.raises(Fatal, match="has format 1 or 2: expected 3"):
        restored(make(tmp_path))


def dying_after(budget: int) -> Callable[..., Any]:
    """`open` for a process that is killed once it has written so many bytes."""
    left = [budget]

    class Dying:
        def __init__(self, path: str, mode: str) -> None:
            self.file = open(path, mode, buffering=0)  # noqa: SIM115 - closed by __exit__

        def __enter__(self) -> "Dying":
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: Any) -> None:
            data = bytes(data)
            self.file.write(data[: left[0]])
            if len(data) > left[0]:
                os._exit(9)
            left[0] -= len(data)

    return Dying


def write_and_die(folder: Path, step: int, budget: int) -> int:
    """Save in a process that dies after so many bytes; its exit status, 0 if it lived."""
    child = os.fork()
    if child == 0:
        atomic.open = dying_after(budget)  # type: ignore[attr-defined]
        save(make(folder), step)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_process_killed_at_any_byte_of_a_write_leaves_the_last_complete_one(
    tmp_path: Path,
) -> None:
    save(make(tmp_path), 5, 10)
    sizes = [(tmp_path / "checkpoints" / name).stat().st_size for name in files_of(10)]
    parts, whole = sizes[0] + sizes[2], sum(sizes)
    draw, chosen = random.Random(1), []
    offsets = [0, parts - 1, parts, whole - 1, whole]
    for offset in sorted(offsets + [draw.randrange(whole) for _ in range(50)]):
        status = write_and_die(tmp_path, 15, offset)
        chosen.append((status, restored(make(tmp_path))))
    assert chosen == [(9, 10)] * 54 + [(0, 15)]
    assert names(tmp_path) == files_of(10, 15)  # what the killed ones left is gone too


def test_a_rewritten_checkpoint_is_not_vouched_for_by_its_old_marker(tmp_path: Path) -> None:
    save(make(tmp_path), 5, 10)
    assert write_and_die(tmp_path, 10, 100) == 9
    assert restored(make(tmp_path)) == 5


def test_damaged_newer_ones_do_not_displace_what_training_continued_from(tmp_path: Path) -> None:
    save(make(tmp_path), 5, 10, 15)
    (tmp_path / "checkpoints" / "step-00000015.pt").write_bytes(b"torn")
    save(make(tmp_path), 12)
    assert names(tmp_path) == files_of(10, 12)


def test_the_loop_goes_on_while_one_write_is_under_way_and_waits_for_it_at_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, may_write, real = make(tmp_path), threading.Event(), files.write_with
    monkeypatch.setattr(
        files, "write_with", lambda uri, write: (may_write.wait(20), real(uri, write))[1]
    )
    running = tensors(5)
    checkpoints.save(5, running, {"step": 5})
    running["w"].zero_()  # the next step
    assert restored(make(tmp_path)) is None
    second = threading.Thread(target=lambda: start_save(checkpoints, 10))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    may_write.set()
    second.join(20)
    checkpoints.wait()
    (tmp_path / "checkpoints" / "step-00000010.json").unlink()
    assert restored(make(tmp_path)) == 5


def test_a_write_is_tried_again_and_only_repeated_failures_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoint, "RETRY_AFTER_S", (0.0, 0.0))
    checkpoints, real = make(tmp_path), files.write_with
    failures = [OSError("disk full")] * 2

    def failing(uri: str, write: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(uri, write)

    monkeypatch.setattr(files, "write_with", failing)
    save(checkpoints, 5)
    assert names(tmp_path) == files_of(5)
    assert caplog.text.count("step 5 was not written: disk full") == 2

    failures.extend([OSError("disk full")] * 3)
    save(checkpoints, 10)
    assert names(tmp_path) == files_of(5)
    save(checkpoints, 15)  # one failure is forgiven
    assert names(tmp_path) == files_of(5, 15)
    failures.extend([OSError("disk full")] * 6)
    save(checkpoints, 20, 25)
    with pytest.raises(RuntimeError, match="last 2 training checkpoints could not be written"):
        start_save(checkpoints, 30)


def test_a_tensor_is_written_slice_by_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, write = [], files._HashedWriter.write

    def noting(writer: Any, data: Any) -> int:
        sizes.append(memoryview(data).nbytes)
        return write(writer, data)

    monkeypatch.setattr(checkpoint_format, "WRITE_BYTES", 100)
    monkeypatch.setattr(files._HashedWriter, "write", noting)
    uri = str(tmp_path / "part")
    copies = {"w": torch.arange(64.0)}
    checkpoint_format.write_part(
        uri, checkpoint_format.plan_layout(copies, lambda value: [value]).of_rank(0), copies
    )
    assert sizes == [100, 100, 56]
    assert files.read_bytes(uri) == copies["w"].numpy().tobytes()


def test_a_checkpoint_is_due_by_steps_and_by_time(tmp_path: Path) -> None:
    checkpoints = make(tmp_path)
    assert [s for s in range(1, 12) if checkpoints.due(s)] == [5, 10]
    assert not checkpoints.overdue()
    checkpoints.every_s = 0.0
    assert checkpoints.overdue()


def test_a_snapshot_is_a_copy_in_the_same_memory_every_time() -> None:
    snapshot, tensor = Snapshot(), torch.ones(3)
    first = snapshot.take({"a": [tensor, {"b": 2.0}], "betas": (0.5, 0.9)})
    tensor.fill_(7)
    assert first == {"a": [first["a"][0], {"b": 2.0}], "betas": (0.5, 0.9)}
    assert first["a"][0].tolist() == [1, 1, 1]
    second = snapshot.take({"a": [tensor, {"b": 3.0}]})
    assert second["a"][0].data_ptr() == first["a"][0].data_ptr()
    assert second["a"][0].tolist() == [7, 7, 7]
    assert snapshot.take({"a": [torch.zeros(2)]})["a"][0].tolist() == [0, 0]


def test_weights_survive_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(weights_bytes({"a": torch.arange(6.0).view(2, 3).T}))
    assert torch.equal(load_weights(str(path))["a"], torch.arange(6.0).view(2, 3).T)
