"""Checks of the stage `shard` and of loading pictures: CPU time an image, and memory.

For comparison, the code of 2026-11-24 took 96 ms of CPU an image (squares and PNG views), held up
to 7.8 GB in an actor, and 2.9 kB a file in the driver; random crops took 12.1 ms.
"""

import base64
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from drorae.config import Compute, Resources
from drorae.data.images import ImageShards
from drorae.data.jobs import OrderConfig, ShardJob
from drorae.data.loaders import crop_batches, tokenizer_batches
from drorae.data.random_crops import RandomCrops
from drorae.data.shard_files import CHECKED_SCHEMA
from drorae.data.shard_format import ShardPart
from drorae.data.shard_map import BuildWorker, ShardTask, run_in_process
from drorae.data.shard_plan import read_plan
from drorae.data.sharding import run_shard
from drorae.store.context import StageContext
from drorae.store.workspace import StageOutput
from tests.rehearsal.bench import Bench, in_process
from tests.rehearsal.line import Line
from tests.rehearsal.outputs import committed
from tests.rehearsal.pictures import photo_jpeg

SIDE_PX, VIEW_PX = 256, 384
DISTINCT = 64
"""Photographs that are made; the others are copies with other bytes after their end."""
CLASSES = 1000
BATCH = 32
TOKENIZER_S = 5.07e-3
"""GPU time of an image in a tokenizer's step, 40 % of an H100's peak."""
GPU_CORES = 12
"""Cores of a GPU in infra/kubernetes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a stage took."""

    cpu_s: float
    """CPU seconds an image."""
    peak_bytes: int
    """Largest memory of the process."""
    output: StageOutput
    """What it wrote."""


def source(bench: Bench) -> Iterator[Line]:
    """Photographs into one shard of the default size that keeps their files, then crops of it."""
    cost = _shard(bench, "source", bench.sizes.shard_photos)
    yield from _of_stage("source", cost)
    crops = RandomCrops(cost.output, seed=0, threads=1)
    order = OrderConfig(streams=1, window_shards=0)
    steps = min(8, len(crops) // BATCH)
    batches = crop_batches(crops, seed=0, num_steps=steps, global_batch=BATCH, order=order)
    yield _loading("source", "random crop", batches)


def square(bench: Bench) -> Iterator[Line]:
    """Photographs into one shard of exact squares, and its squares read again."""
    cost = _shard(bench, "square", bench.sizes.square_photos)
    yield from _of_stage("square", cost)
    images = ImageShards(cost.output, "train", keep_bytes=0, threads=1)
    steps = min(8, len(images) // BATCH)
    batches = tokenizer_batches(images, None, seed=0, num_steps=steps, global_batch=BATCH)
    yield _loading("square", "square", batches)


def driver(bench: Bench) -> Iterator[Line]:
    """List, choose and plan many files, with tasks that do nothing."""
    folder = bench.new_folder()
    peak = in_process(_plan_files, folder, bench.sizes.listed_files)
    yield Line(
        check="driver",
        what=f"memory for {bench.sizes.listed_files:,} files, GB",
        measured=peak / 1e9,
        bound=1,
    )


CHECKS = {"source": source, "square": square, "driver": driver}


def _of_stage(check: str, cost: Cost) -> Iterator[Line]:
    yield Line(check=check, what="CPU of an image, ms", measured=1e3 * cost.cpu_s, bound=25)
    yield Line(
        check=check, what="memory of an actor, GB", measured=cost.peak_bytes / 1e9, bound=1.5
    )


def _loading(check: str, kind: str, batches: Iterator[Any]) -> Line:
    next(batches)  # imports, pages
    started_s, count = time.process_time(), 0
    for batch in batches:
        count += len(batch.labels)
    cores = (time.process_time() - started_s) / count / TOKENIZER_S
    what = f"cores that load a {kind} as fast as a GPU takes it"
    return Line(check=check, what=what, measured=cores, bound=GPU_CORES / 2)


def _shard(bench: Bench, pictures: Literal["square", "source"], count: int) -> Cost:
    folder = bench.new_folder()
    _write_photos(folder / "photos", count, bench.seed)
    return in_process(_run_shard, folder, pictures, count)


def _write_photos(folder: Path, count: int, seed: int) -> None:
    photos = [photo_jpeg(1000 * seed + number) for number in range(min(count, DISTINCT))]
    for number, photo in zip(range(count), itertools.cycle(photos)):
        path = folder / f"n{number % 20:08d}" / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo + number.to_bytes(4, "big"))


def _run_shard(folder: Path, pictures: Literal["square", "source"], count: int) -> Cost:
    """In a fresh process, as an actor is one."""
    uri = str(folder / "stages" / "shard" / "key")
    job = ShardJob(
        source=str(folder / "photos"),
        val_fraction=0,
        resolution_px=SIDE_PX,
        pictures=pictures,
        view_px=VIEW_PX if pictures == "source" else None,
    )
    ctx = StageContext(stage="shard", key="key", output_uri=uri, compute=Compute())
    started_s = time.process_time()
    result = run_shard(ctx, shard=job, executor=run_in_process)
    cpu_s = (time.process_time() - started_s) / count
    return Cost(cpu_s=cpu_s, peak_bytes=_peak_bytes(), output=committed(uri, "shard", result.files))


def _plan_files(folder: Path, count: int) -> int:
    for number in range(count):
        path = folder / "photos" / f"n{number % CLASSES:08d}"
        if number < CLASSES:
            path.mkdir(parents=True)
        (path / f"n{number % CLASSES:08d}_{number}.JPEG").touch()
    ctx = StageContext(stage="shard", key="key", output_uri=str(folder / "out"))
    run_shard(ctx, shard=ShardJob(source=str(folder / "photos")), executor=_no_work)
    return _peak_bytes()


def _no_work(
    tasks: Sequence[ShardTask], build_worker: BuildWorker, compute: Compute, resources: Resources
) -> Iterator[tuple[str, dict[str, Any]]]:
    """An executor whose pictures are all good and of 100 kB."""
    del build_worker, compute, resources
    answer = _write_answer if "name" in tasks[0].payload else _check_answer
    return ((task.name, answer(task)) for task in tasks)


def _check_answer(task: ShardTask) -> dict[str, Any]:
    positions = read_plan(task)["position"].to_pylist()
    rows = [
        {
            "position": position,
            "sha256": position.to_bytes(32, "big"),
            "width": 500,
            "height": 375,
            "pack": -1,
            "start": 0,
            "size_bytes": 100_000,
            "reason": "",
        }
        for position in positions
    ]
    table = pa.Table.from_pylist(rows, schema=CHECKED_SCHEMA)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return {"checked": base64.b64encode(sink.getvalue()).decode()}


def _write_answer(task: ShardTask) -> dict[str, Any]:
    rows = len(read_plan(task))
    part = ShardPart(
        name=str(task.payload["name"]),
        size_bytes=100_000 * rows,
        sha256="0" * 64,
        labels=np.zeros(rows, np.int32),
        sizes=np.full(rows, 100_000, np.int32),
        offsets={"image": 0},
    )
    return part.to_json()


def _peak_bytes() -> int:
    """Of this process alone: the usage that a parent hands on does not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return 1024 * int(peak)
