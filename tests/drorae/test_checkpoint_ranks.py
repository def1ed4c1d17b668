"""Checkpoints of several ranks, in processes of their own that are joined by gloo."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from drorae import checkpoint
from drorae.checkpoint import TrainingCheckpoints
from drorae.failure import Fatal
from drorae.store import files

pytestmark = pytest.mark.slow

multiprocessing.set_forkserver_preload([__name__])


def make(folder: str) -> TrainingCheckpoints:
    return TrainingCheckpoints(work_uri=folder, every_steps=5, every_s=1e9, keep=2, timeout_s=30)


def values(step: int) -> dict[str, Tensor]:
    """Whole tensors: sharded below are those of `cut`, one of which leaves rank 2 of 3 empty."""
    grid = torch.arange(35.0).view(7, 5) + 100 * step
    return {
        "grid": grid,
        "short": grid[:2].clone(),
        "count": torch.tensor(float(step)),
        "w": grid.T,
    }


def cut(whole: dict[str, Tensor], is_sharded: bool) -> dict[str, Tensor]:
    if not is_sharded:
        return {name: value.clone() for name, value in whole.items()}
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    names = ("grid", "short")
    return whole | {name: distribute_tensor(whole[name], mesh, [Shard(0)]) for name in names}


def save(folder: str, step: int, is_sharded: bool) -> None:
    checkpoints = make(folder)
    checkpoints.save(step, cut(values(step), is_sharded), {"step": step})
    checkpoints.wait()


def assert_restored(folder: str, step: int, is_sharded: bool) -> None:
    found = cut({name: value * 0 for name, value in values(step).items()}, is_sharded)
    assert make(folder).restore(lambda: found) == {"step": step}
    for name, value in values(step).items():
        have = found[name]
        assert torch.equal(have.full_tensor() if isinstance(have, DTensor) else have, value), name


def start(num_ranks: int, task: Callable[..., None], *arguments: Any) -> None:
    """Run a task on so many ranks."""
    path = mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    with tempfile.TemporaryDirectory() as folder, path:
        multiprocessing.start_processes(
            _rank, (num_ranks, folder, task, arguments), num_ranks, start_method="forkserver"
        )


def _rank(rank: int, num_ranks: int, folder: str, task: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", num_ranks)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    task(*arguments)
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.parametrize("is_sharded", [False, True])
def test_what_some_ranks_wrote_others_read(tmp_path: Path, is_sharded: bool) -> None:
    folder = str(tmp_path)
    start(3, save, folder, 5, is_sharded)
    written = {p.name: p.stat().st_size for p in (tmp_path / "checkpoints").glob("*.bin")}
    assert len(written) == 3
    assert sum(written.values()) == sum(v.nbytes for v in values(5).values())
    assert max(written.values()) < 0.6 * sum(written.values())  # nobody writes everything
    start(2, assert_restored, folder, 5, is_sharded)
    start(3, assert_restored, folder, 5, not is_sharded)
    assert_restored(folder, 5, False)
    save(folder, 10, False)
    start(2, assert_restored, folder, 10, True)


def test_ranks_agree_on_an_older_one_when_a_file_of_any_is_damaged(tmp_path: Path) -> None:
    folder = str(tmp_path)
    for step in (5, 10):
        start(2, save, folder, step, True)
    damaged = tmp_path / "checkpoints" / "step-00000010.1.bin"
    damaged.write_bytes(bytes(len(damaged.read_bytes())))
    start(2, assert_restored, folder, 5, True)


def test_files_of_more_ranks_that_a_new_save_replaces_are_deleted(tmp_path: Path) -> None:
    start(2, save, str(tmp_path), 5, False)
    save(str(tmp_path), 5, False)
    assert not (tmp_path / "checkpoints" / "step-00000005.1.bin").exists()
    assert_restored(str(tmp_path), 5, False)


def _refused(folder: str) -> None:
    with pytest.raises(Fatal, match="has format 99: expected 3"):
        make(folder).restore(lambda: cut(values(0), False))


def test_a_checkpoint_that_rank_0_refuses_ends_every_rank_at_once(tmp_path: Path) -> None:
    save(str(tmp_path), 5, False)
    marker = tmp_path / "checkpoints" / "step-00000005.json"
    marker.write_text(marker.read_text().replace('"format":3', '"format":99'))
    start(2, _refused, str(tmp_path))


def _late_on_rank_1(folder: str) -> None:
    write, failures = files.write_with, [OSError("the store is away")]

    def late(uri: str, save: Callable[..., None]) -> Any:
        if distributed.get_rank() == 1 and failures:
            raise failures.pop()
        return write(uri, save)

    checkpoint.RETRY_AFTER_S, files.write_with = (3.0,), late  # type: ignore[assignment]
    checkpoints = make(folder)
    checkpoints.timeout_s = 1.0
    for step in (5, 10):
        checkpoints.save(step, cut(values(step), False), {})
    checkpoints.wait()
    assert "step-00000005.json" in files.list_files(f"{folder}/checkpoints")


def test_ranks_wait_for_one_that_tries_again(tmp_path: Path) -> None:
    start(2, _late_on_rank_1, str(tmp_path))


def _fail_on_rank_1(folder: str) -> None:
    checkpoint.RETRY_AFTER_S = ()
    if distributed.get_rank() == 1:

        def full(*arguments: Any) -> None:
            raise OSError(28, "No space left on device")

        files.write_with = full  # type: ignore[assignment]
    checkpoints = make(folder)
    for step in (5, 10):
        checkpoints.save(step, cut(values(step), True), {})
    with pytest.raises(RuntimeError, match=r"last 2 .*rank 1: \[Errno 28\] No space left"):
        checkpoints.save(15, cut(values(15), True), {})
    assert files.list_files(f"{folder}/checkpoints") == [
        f"step-{step:08d}.{end}" for step in (5, 10) for end in ("0.bin", "pt")
    ]


def test_a_rank_that_cannot_write_leaves_no_checkpoint_and_stops_all_at_the_second_time(
    tmp_path: Path,
) -> None:
    start(2, _fail_on_rank_1, str(tmp_path))
