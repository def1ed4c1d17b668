"""What the checks share: sizes, a folder, an S3 server and its capped connections."""

import contextlib
import functools
import itertools
import multiprocessing
import queue
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from drorae.store.workspace import StageOutput
from tests.integration.s3_server import S3Server, running_s3_server
from tests.rehearsal.link import Link, capped_link
from tests.rehearsal.node import Loop, Seen, run_loop
from tests.rehearsal.outputs import write_latents

CAP_BYTES_S = 100e6
"""Network of a node: 100 MB/s, at which the code of 2026-11-24 needed 90 s to its first batch."""
LATENT_GRID = (16, 16)
PROCESS_TIMEOUT_S = 900.0
LOOK_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much of everything."""

    latent_shards: int = 80
    """Shards of latents on S3."""
    latent_rows: int = 64
    """Rows of each: 25 MB."""
    latent_channels: int = 768
    """Channels of 16 x 16 latents."""
    shard_photos: int = 4096
    """Photographs of the stage `shard` that keeps sources: one shard of the default size."""
    square_photos: int = 512
    """Those of the one that keeps squares: one chunk."""
    listed_files: int = 300_000
    """Files in the folder that a driver lists and plans."""
    output_files: int = 2600
    """Files of a workspace whose rerun is counted."""


QUICK = Sizes(
    latent_channels=96,
    shard_photos=256,
    square_photos=192,
    listed_files=20_000,
    output_files=200,
)


class Bench:
    """Made when first asked for, gone at the end; context manager.

    Args:
        sizes: How much of everything.
        seed: Seed of contents and orders.
    """

    def __init__(self, sizes: Sizes, seed: int) -> None:
        self.sizes, self.seed = sizes, seed
        self.folder = Path(tempfile.mkdtemp(prefix="drorae-rehearsal-"))
        self._stack = contextlib.ExitStack()
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self._folders = itertools.count()

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @functools.cached_property
    def server(self) -> S3Server:
        """The S3 server; this process's environment points at it, without a cap."""
        server = self._stack.enter_context(running_s3_server())
        environment = mock.patch.dict("os.environ", server.environment)
        self._stack.enter_context(environment)
        return server

    @functools.cached_property
    def bucket(self) -> str:
        """Address of a bucket."""
        return f"s3://{self.server.new_bucket()}"

    @functools.cached_property
    def latents(self) -> StageOutput:
        """Latents on S3."""
        uri = f"{self.bucket}/stages/latents/rehearsal"
        return self.write_latents(uri, self.sizes.latent_shards)

    @property
    def num_latents(self) -> int:
        """Rows of all its shards."""
        return self.sizes.latent_shards * self.sizes.latent_rows

    def write_latents(self, uri: str, num_shards: int) -> StageOutput:
        """Some shards of latents."""
        shape = (self.sizes.latent_channels, *LATENT_GRID)
        return write_latents(uri, num_shards, self.sizes.latent_rows, shape, self.seed)

    @property
    def latent_bytes(self) -> int:
        """Bytes of a row."""
        return 2 * self.sizes.latent_channels * LATENT_GRID[0] * LATENT_GRID[1]

    def new_folder(self) -> Path:
        """A folder for the cache of a node that holds nothing yet, or for other files."""
        return self.folder / str(next(self._folders))

    def new_link(self) -> Link:
        """A capped connection to the S3 server, of a node of its own."""
        return self._stack.enter_context(capped_link(self.server.endpoint, CAP_BYTES_S))

    def run(self, loops: Sequence[Loop]) -> list[Seen]:
        """Run ranks side by side, each in a process of its own, begun when all are ready.

        Raises:
            RuntimeError: A rank failed.
            TimeoutError: None ended in time.
        """
        spawn = multiprocessing.get_context("spawn")
        start, results = spawn.Barrier(len(loops)), spawn.Queue()
        processes = [
            spawn.Process(target=run_loop, args=(one, start, results), daemon=True) for one in loops
        ]
        for process in processes:
            process.start()
        try:
            return [next_result(results, processes) for _ in loops]
        finally:
            for process in processes:
                process.kill()  # a failed rank leaves the others waiting for it
                process.join()


def next_result(results: Any, processes: Sequence[Any]) -> Seen:
    """What the next rank to end has measured.

    Raises:
        RuntimeError: A rank failed.
        TimeoutError: None ended in time.
    """
    deadline_s = time.monotonic() + PROCESS_TIMEOUT_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(queue.Empty):
            return results.get(timeout=LOOK_EVERY_S)
        if any(process.exitcode for process in processes):
            raise RuntimeError("a rank failed; its error stands above")
    raise TimeoutError(f"no rank ended within {PROCESS_TIMEOUT_S:.0f} s")


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process, whose memory and CPU time are then its alone."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:  # notices a child that was killed
        return pool.submit(function, *arguments).result(PROCESS_TIMEOUT_S)
