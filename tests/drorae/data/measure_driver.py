"""Run the driver of the shard stage over so many listed images, and print its peak memory in MB.

Nothing is read or decoded: the listing and the outcomes of tasks are made up, so that only what the
driver itself holds is measured. Use: measure_driver.py NUM_IMAGES FOLDER
"""

import base64
import resource
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from drorae.config import Compute
from drorae.data.jobs import ShardJob
from drorae.data.readers import source
from drorae.data.shard_files import CHECKED_SCHEMA, CheckPictures
from drorae.data.shard_format import ShardPart
from drorae.data.shard_map import ShardTask
from drorae.data.shard_plan import read_plan
from drorae.data.sharding import run_shard
from drorae.store.context import StageContext


def checked(task: ShardTask) -> dict[str, Any]:
    plan = read_plan(task)
    count = len(plan)
    digests = [int(p).to_bytes(32, "little") for p in plan["position"].to_numpy()]
    columns = {name: np.zeros(count, np.int64) for name in CHECKED_SCHEMA.names}
    columns |= {"position": plan["position"], "sha256": digests, "reason": [""] * count}
    columns |= {"pack": np.full(count, -1), "size_bytes": np.full(count, 110_000)}
    arrays = [
        pa.array(columns[f.name], f.type)
        if f.name != "position"
        else columns["position"].combine_chunks()
        for f in CHECKED_SCHEMA
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, CHECKED_SCHEMA) as writer:
        writer.write_table(pa.table(arrays, schema=CHECKED_SCHEMA))
    return {"checked": base64.b64encode(sink.getvalue()).decode()}


def written(task: ShardTask) -> dict[str, Any]:
    plan = read_plan(task)
    return ShardPart(
        name=task.payload["name"],
        size_bytes=1,
        sha256="0" * 64,
        labels=plan["label"].to_numpy(),
        sizes=plan["size_bytes"].to_numpy(),
        offsets={"image": 0},
    ).to_json()


def made_up(
    tasks: Sequence[ShardTask], build: Any, compute: Compute, worker: Any
) -> Iterator[tuple[str, dict[str, Any]]]:
    is_check = build.args[0].func is CheckPictures
    for task in tasks:
        yield task.name, checked(task) if is_check else written(task)


def main() -> None:
    count, folder = int(sys.argv[1]), sys.argv[2]
    names = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i:08d}.JPEG" for i in range(count)]
    source.walk = lambda uri, on_progress: (sorted(names), [])
    ctx = StageContext(stage="shard", key="k", output_uri=folder)
    job = ShardJob(source="s3://bucket/train", pictures="source", rows_per_shard=1024)
    result = run_shard(ctx, shard=job, executor=made_up)
    assert sum(v for k, v in result.metrics.items() if "rejected" not in k) == count
    sys.stdout.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}\n")


if __name__ == "__main__":
    main()
