"""How long a checkpoint stops the loop, and what memory it takes, on two ranks with shards (gloo).

PYTHONPATH=. nice python tests/benchmarks/bench_checkpoint.py --parameters 2e8 --folder /tmp

Every parameter has float32 weight, average and two moments: 16 bytes. Cost grows with the bytes of
a rank, not with those of the model. `more_memory_in_copies` is the peak of a process above
its tensors, over their bytes; on a GPU that is all host memory that it takes.

2026-11-25, two cores of an AMD EPYC shared with other programs (load 14 to 39: wall
time says nothing), 0.2e9 parameters, 1.61 GB a rank. A save: the loop stands still for 0.33 CPU-s
(0.2 CPU-s a GB; 1.1 the first time, when the memory is taken), 1.9 CPU-s a GB in all, 1.00 copies.
A restore: 2.9 CPU-s a GB, 1.01 copies. Whole files of rank 0 took 7 and 10 CPU-s a GB and 2.4
copies. 0.8e9 parameters are 6.4 GB a rank: 1.3 CPU-s of standstill, 18 CPU-s to restore; not run,
for want of memory.
"""

import argparse
import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor, distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor import zeros as sharded_zeros

from drorae.checkpoint import TrainingCheckpoints

RANKS = 2
SHAPE = (4608, 1152)
KINDS = ("module", "ema", "exp_avg", "exp_avg_sq")
GB = 1e9


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for task in (measure_save, measure_restore):
            arguments = (folder, task, options.parameters)
            multiprocessing.start_processes(run_rank, arguments, RANKS, start_method="spawn")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=float, default=0.8e9)
    parser.add_argument("--folder", default=None, help="where the checkpoint is written")
    return parser.parse_args()


def run_rank(rank: int, folder: str, task: Callable[..., dict], parameters: float) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/{task.__name__}", RANKS)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    tensors = shards(math.ceil(parameters / math.prod(SHAPE)))
    row = task(folder, tensors, sum(value.to_local().nbytes for value in tensors.values()) / GB)
    rows: list = [None] * RANKS
    distributed.all_gather_object(rows, row)
    if rank == 0:
        worst = {name: round(max(row[name] for row in rows), 3) for name in row}
        sys.stdout.write(f"{task.__name__}: {json.dumps(worst)}\n")
    distributed.destroy_process_group()


def shards(count: int) -> dict[str, Tensor]:
    """Zeros in the place of weights, averages and moments."""
    mesh = init_device_mesh("cpu", (RANKS,))
    names = [f"{kind}.{number}" for number in range(count) for kind in KINDS]
    return {name: sharded_zeros(SHAPE, device_mesh=mesh, placements=[Shard(0)]) for name in names}


def make(folder: str) -> TrainingCheckpoints:
    return TrainingCheckpoints(work_uri=folder, every_steps=1, every_s=1e9, keep=1)


def measure_save(folder: str, tensors: dict[str, Tensor], rank_gb: float) -> dict[str, float]:
    checkpoints, before_gb = make(folder), resident_gb()
    row = {"rank_gb": rank_gb}
    for step, name in ((1, "first"), (2, "next")):
        distributed.barrier()
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        checkpoints.save(step, tensors, {"step": step})
        row[f"{name}_blocks_s"] = time.perf_counter() - start_s
        row[f"{name}_blocks_cpu_s"] = time.process_time() - start_cpu_s
        checkpoints.wait()
        row[f"{name}_cpu_s_per_gb"] = (time.process_time() - start_cpu_s) / rank_gb
        row[f"{name}_s_per_gb"] = (time.perf_counter() - start_s) / rank_gb
    return row | {"more_memory_in_copies": (peak_gb() - before_gb) / rank_gb}


def measure_restore(folder: str, tensors: dict[str, Tensor], rank_gb: float) -> dict[str, float]:
    before_gb, start_s, start_cpu_s = resident_gb(), time.perf_counter(), time.process_time()
    assert make(folder).restore(lambda: tensors) == {"step": 2}
    return {
        "rank_gb": rank_gb,
        "s_per_gb": (time.perf_counter() - start_s) / rank_gb,
        "cpu_s_per_gb": (time.process_time() - start_cpu_s) / rank_gb,
        "more_memory_in_copies": (peak_gb() - before_gb) / rank_gb,
    }


def resident_gb() -> float:
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / GB


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


if __name__ == "__main__":
    main()
