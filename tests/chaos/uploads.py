"""Checkpoint writes that are killed at a byte: `python -m tests.chaos.uploads FOLDER SEED COUNT`.

A program of its own, since it forks. The kernel ends the writing process at the byte (limit of the
file size, signal SIGXFSZ), whatever the code that writes: no part of the product is replaced.
Prints what went wrong, as JSON.
"""

import json
import os
import random
import resource
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from drorae.checkpoint import TrainingCheckpoints


def state(step: int) -> dict[str, Any]:
    """A state of about 40 kB that tells its step."""
    return {"step": step, "weights": torch.full((10_000,), float(step))}


def checkpoints(folder: Path) -> TrainingCheckpoints:
    """As a stage makes them."""
    return TrainingCheckpoints(work_uri=str(folder), every_steps=5, every_s=1e9, keep=2)


def save_whole(folder: Path, step: int) -> None:
    """Save and wait until it is written."""
    target = checkpoints(folder)
    target.save(step, state(step))
    target.wait()


def save_until(folder: Path, step: int, num_bytes: int) -> bool:
    """Save in another process that ends at a byte of the file; returns whether it was killed."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
        save_whole(folder, step)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def problems_of(folder: Path, num_bytes: int) -> list[str]:
    """What is wrong after a kill at a byte of the second checkpoint."""
    save_whole(folder, 5)
    killed = save_until(folder, 10, num_bytes)
    found = checkpoints(folder).latest()
    expected = 5 if killed else 10
    if found is None or not torch.equal(found["weights"], state(expected)["weights"]):
        return [f"byte {num_bytes}: step {found and found['step']}, expected {expected}"]
    save_whole(folder, 10)
    after = checkpoints(folder).latest()
    return [] if after and after["step"] == 10 else [f"byte {num_bytes}: the next save was lost"]


def main(argv: list[str]) -> None:
    """Kill so many writes at random bytes."""
    root, seed, count = Path(argv[0]), int(argv[1]), int(argv[2])
    torch.set_num_threads(1)
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=root) as probe:
        save_whole(Path(probe), 5)
        length = max(path.stat().st_size for path in Path(probe).rglob("step-*"))
    problems: list[str] = []
    for number in range(count):
        # Also past the end: such a write is not killed, and its checkpoint has to count.
        folder = root / str(number)
        problems += problems_of(folder, draw.randrange(int(1.05 * length)))
    sys.stdout.write(json.dumps({"problems": problems, "bytes": length}))


if __name__ == "__main__":
    main(sys.argv[1:])
