import functools
from pathlib import Path

import pytest

from drorae.config import Compute, Resources
from drorae.data import known_results
from drorae.data.shard_map import ShardTask, map_shards, num_actors, run_in_process
from drorae.store import files


class Writer:
    """Writes its payload; notes every call in a file."""

    def __init__(self, folder: str, fail_on: str = "") -> None:
        self.folder, self.fail_on = Path(folder), fail_on

    def __call__(self, task: ShardTask) -> dict:
        if task.name == self.fail_on:
            raise RuntimeError(f"{task.name} fails")
        with (self.folder / "calls").open("a") as file:
            file.write(f"{task.name}\n")
        return {"double": task.payload["number"] * 2}


TASKS = [ShardTask(f"part-{i}", {"number": i}) for i in range(4)]


def run(tmp_path: Path, tasks=TASKS, fail_on: str = "", on_progress=None, executor=run_in_process):
    return map_shards(
        tasks,
        functools.partial(Writer, str(tmp_path), fail_on),
        work_uri=str(tmp_path / "work"),
        compute=Compute(),
        on_progress=on_progress,
        executor=executor,
    )


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().split()


def test_results_come_in_task_order(tmp_path: Path):
    assert [r["double"] for r in run(tmp_path)] == [0, 2, 4, 6]


def test_rerun_redoes_only_what_is_missing(tmp_path: Path):
    run(tmp_path)
    files.delete(str(tmp_path / "work/done/part-2.json"))
    assert [r["double"] for r in run(tmp_path)] == [0, 2, 4, 6]
    assert calls(tmp_path) == ["part-0", "part-1", "part-2", "part-3", "part-2"]


@pytest.mark.parametrize("bundle", [2, 3, 100])
def test_a_rerun_reads_bundles_and_not_every_marker(tmp_path: Path, monkeypatch, bundle: int):
    monkeypatch.setattr(known_results, "BUNDLE_RESULTS", bundle)
    tasks = [ShardTask(f"part-{i:02d}", {"number": i}) for i in range(10)]
    run(tmp_path, tasks)
    read: list[str] = []
    real = files.read_json
    monkeypatch.setattr(files, "read_json", lambda uri: read.append(uri) or real(uri))
    assert [r["double"] for r in run(tmp_path, tasks)] == [2 * i for i in range(10)]
    assert len(read) <= 10 // bundle + 1
    assert len(calls(tmp_path)) == 10


def test_a_failure_keeps_what_was_done(tmp_path: Path):
    with pytest.raises(RuntimeError, match="part-2 fails"):
        run(tmp_path, fail_on="part-2")
    run(tmp_path)
    assert calls(tmp_path) == ["part-0", "part-1", "part-2", "part-3"]


def test_progress_counts_earlier_attempts(tmp_path: Path):
    run(tmp_path, TASKS[:2])
    seen: list[tuple[int, int]] = []
    run(tmp_path, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 4), (3, 4), (4, 4)]


def test_repeated_names_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="shard names repeat"):
        run(tmp_path, [TASKS[0], TASKS[0]])


def test_lost_results_are_told(tmp_path: Path):
    with pytest.raises(RuntimeError, match="4 shards returned no result"):
        run(tmp_path, executor=lambda *args: [])


def test_no_tasks_give_no_results(tmp_path: Path):
    assert run(tmp_path, []) == []


def test_progress_counts_the_size_of_tasks(tmp_path: Path):
    sized = [ShardTask(f"part-{i}", {"number": i}, size=10**i) for i in range(3)]
    seen: list[tuple[int, int]] = []
    run(tmp_path, sized, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 111), (1, 111), (11, 111), (111, 111)]


@pytest.mark.parametrize(
    ("compute", "gpus", "actors"),
    [
        (Compute(data_actors=3), 1.0, 3),
        (Compute(data_actors=3, use_gpu=True), 1.0, 128),
        (Compute(data_actors=3, use_gpu=True), 0.5, 256),
        (Compute(data_actors=3, use_gpu=True), 0.0, 3),
    ],
)
def test_actors_that_compute_follow_the_gpus_of_the_cluster(
    compute: Compute, gpus: float, actors: int
):
    cluster = {"GPU": 128.0, "CPU": 4.0}
    assert num_actors(compute, Resources(gpus=gpus), cluster) == actors


def test_without_a_gpu_at_the_moment_one_actor_waits_for_one():
    assert num_actors(Compute(use_gpu=True), Resources(gpus=1.0), {"CPU": 4.0}) == 1
