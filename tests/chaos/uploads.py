"""Checkpoint writes that are broken at a byte, as a program of its own, since it forks.

`python -m tests.chaos.uploads FOLDER SEED COUNT`: the kernel ends the writing process at the byte
(limit of the file size, signal SIGXFSZ), whatever the code that writes. With an s3:// address for
the folder a proxy breaks the upload at the byte, as a server sees it when its writer dies. Nothing
of the product is replaced. Prints what went wrong, as JSON.
"""

import json
import logging
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from drorae import checkpoint
from drorae.checkpoint import TrainingCheckpoints
from drorae.store import files, patience, s3
from tests.chaos.proxy import Proxy


def tensors(step: int) -> dict[str, Tensor]:
    """About 40 kB that tell their step."""
    return {"weights": torch.full((10_000,), float(step))}


def checkpoints(uri: str) -> TrainingCheckpoints:
    """As a stage makes them."""
    return TrainingCheckpoints(work_uri=uri, every_steps=5, every_s=1e9, keep=2)


def save_whole(uri: str, step: int) -> None:
    """Save and wait until it is written."""
    target = checkpoints(uri)
    target.save(step, tensors(step), {"step": step})
    target.wait()


def save_killed(uri: str, step: int, num_bytes: int) -> None:
    """Save in another process, which ends at a byte of the file."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
        save_whole(uri, step)
        os._exit(0)
    os.waitpid(child, 0)


def save_cut(proxy: Proxy, uri: str, step: int, num_bytes: int) -> None:
    """Save over a connection that breaks at a byte of the upload."""
    proxy.cut_after = num_bytes
    try:
        save_whole(uri, step)
    finally:
        proxy.cut_after = None


def problems_of(uri: str, num_bytes: int, length: int, save: Callable[..., None]) -> list[str]:
    """What is wrong after the second checkpoint was broken at a byte."""
    save_whole(uri, 5)
    save(uri, 10, num_bytes)
    found, expected = restored(uri), 5 if num_bytes < length else 10
    if found != expected:
        return [f"byte {num_bytes}: step {found}, expected {expected}"]
    save_whole(uri, 10)
    return [] if restored(uri) == 10 else [f"byte {num_bytes}: the next save was lost"]


def restored(uri: str) -> int | None:
    """Step of the checkpoint that counts, if its tensors are those of that step."""
    found = tensors(0)
    small = checkpoints(uri).restore(lambda: found)
    step = small["step"] if small else 0
    return step if small and torch.equal(found["weights"], tensors(step)["weights"]) else None


def main(argv: list[str]) -> None:
    """Break so many writes at random bytes."""
    root, seed, count = argv[0], int(argv[1]), int(argv[2])
    torch.set_num_threads(1)
    draw = random.Random(seed)
    save: Callable[..., None] = save_killed
    if root.startswith("s3://"):
        # A broken connection is not tried again here: the writer is meant to be dead.
        patience.PATIENCE_S, checkpoint.RETRY_AFTER_S = 0.0, ()
        s3.NUM_BOTOCORE_TRIES = s3.NUM_S3FS_TRIES = 1
        proxy = Proxy(os.environ["AWS_ENDPOINT_URL"], seed)
        os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
        save = partial(save_cut, proxy)
        logging.disable()
    save_whole(f"{root}/probe", 5)
    length = max(files.list_sizes(f"{root}/probe").values())
    problems: list[str] = []
    for number in range(count):
        # Also past the end: such a write is whole, and its checkpoint has to count.
        num_bytes = draw.randrange(int(1.05 * length))
        problems += problems_of(f"{root}/{number}", num_bytes, length, save)
    sys.stdout.write(json.dumps({"problems": problems, "bytes": length}))


if __name__ == "__main__":
    main(sys.argv[1:])
