"""Stages of drorae.data on a real local Ray: what the in-process executor cannot show."""

import functools
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import ray.cloudpickle
from PIL import Image

from drorae.config import Compute
from drorae.data.jobs import ShardJob
from drorae.data.ray_session import connect_ray, logical_cpus
from drorae.data.shard_map import ShardTask, map_shards, run_in_process
from drorae.data.sharding import run_shard
from drorae.store.context import StageContext

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("local_ray"),
    # Ray 2.60 warns of options of its own that nobody set, each time it copies its DataContext.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]


# Workers do not see the test folder.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Doubler:
    """Notes each call as a file, so that the test sees work done in other processes."""

    def __init__(self, folder: str, bad: int) -> None:
        self.folder, self.bad = Path(folder), bad

    def __call__(self, task: ShardTask) -> dict:
        number = task.payload["number"]
        if number == self.bad:
            raise ValueError(f"number {number} is unlucky")
        (self.folder / f"{task.name}-{len(list(self.folder.iterdir()))}").touch()
        return {"double": number * 2}


def double(tmp_path: Path, bad: int = -1, count: int = 5) -> list[int]:
    (tmp_path / "calls").mkdir(exist_ok=True)
    results = map_shards(
        [ShardTask(f"part-{i}", {"number": i, "empty": []}) for i in range(count)],
        functools.partial(Doubler, str(tmp_path / "calls"), bad),
        work_uri=str(tmp_path / "work"),
        compute=Compute(data_actors=2, threads_per_worker=1),
    )
    return [r["double"] for r in results]


def test_a_failed_task_fails_the_map_and_a_rerun_keeps_the_finished_ones(tmp_path: Path):
    with pytest.raises(ValueError, match="shard part-4: number 4 is unlucky"):
        double(tmp_path, bad=4)
    finished = {path.stem for path in (tmp_path / "work" / "done").iterdir()}
    assert double(tmp_path) == [0, 2, 4, 6, 8]
    calls = [path.name.rpartition("-")[0] for path in (tmp_path / "calls").iterdir()]
    assert all(calls.count(name) == 1 for name in finished)
    assert set(calls) == {f"part-{i}" for i in range(5)}


def make_photos(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for number in range(12):
            image = Image.fromarray(rng.integers(0, 256, (24, 30, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            image.save(buffer, format="JPEG")
            (root / name / f"{number}.jpg").write_bytes(buffer.getvalue())
    (root / "dog" / "broken.jpg").write_bytes(b"no picture")
    return root


def shard(root: Path, source: Path, executor=None, actors: int = 1) -> dict[str, str]:
    ctx = StageContext(
        stage="shard",
        key="k",
        output_uri=str(root),
        compute=Compute(data_actors=actors, threads_per_worker=1),
    )
    job = ShardJob(source=str(source), resolution_px=16, rows_per_shard=5, val_fraction=0.25)
    result = run_shard(ctx, shard=job, executor=executor)
    return {entry.name: entry.sha256 for entry in result.files}


def test_shards_on_ray_equal_those_of_one_process(tmp_path: Path):
    source = make_photos(tmp_path / "photos")
    expected = shard(tmp_path / "a", source, executor=run_in_process)
    assert shard(tmp_path / "b", source, actors=2) == expected


def test_connecting_twice_starts_nothing():
    assert not connect_ray(Compute())


def test_a_local_ray_has_room_beside_workers_and_actors():
    compute = Compute(num_workers=6, data_actors=2, parallel_stages=2)
    assert logical_cpus(compute) >= 6 + 4 + 1
