from pathlib import Path

import torch

from drorae.checkpoint import TrainingCheckpoints, load_weights, weights_bytes


def make(folder: Path, keep: int = 2) -> TrainingCheckpoints:
    return TrainingCheckpoints(work_uri=str(folder), every_steps=5, every_s=3600.0, keep=keep)


def state(step: int) -> dict:
    return {"step": step, "module": {"w": torch.full((2,), float(step))}, "history": [{"a": 1.0}]}


def test_the_newest_checkpoint_is_chosen_and_old_ones_are_deleted(tmp_path: Path) -> None:
    checkpoints = make(tmp_path)
    assert checkpoints.latest() is None
    for step in (5, 10, 15):
        checkpoints.save(step, state(step))
    found = make(tmp_path).latest()
    assert found is not None
    assert found["step"] == 15
    assert torch.equal(found["module"]["w"], torch.full((2,), 15.0))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{s:08d}.{e}" for s in (10, 15) for e in ("json", "pt")]


def test_a_torn_or_unmarked_checkpoint_is_never_chosen(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, keep=5)
    for step in (5, 10, 15, 20):
        checkpoints.save(step, state(step))
    folder = tmp_path / "checkpoints"
    (folder / "step-00000020.json").unlink()
    torn = folder / "step-00000015.pt"
    torn.write_bytes(torn.read_bytes()[:-1] + b"x")
    (folder / "step-00000010.pt").unlink()
    found = checkpoints.latest()
    assert found is not None
    assert found["step"] == 5


def test_a_checkpoint_is_due_by_steps_and_by_time(tmp_path: Path) -> None:
    checkpoints = make(tmp_path)
    assert [s for s in range(1, 12) if checkpoints.due(s)] == [5, 10]
    checkpoints.every_s = 0.0
    assert checkpoints.due(1)


def test_weights_survive_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(weights_bytes({"a": torch.arange(6.0).view(2, 3).T}))
    assert torch.equal(load_weights(str(path))["a"], torch.arange(6.0).view(2, 3).T)
