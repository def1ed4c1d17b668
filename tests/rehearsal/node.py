"""What runs in the processes of a node: a loop over latents with a GPU that is made up."""

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drorae.data.jobs import OrderConfig
from drorae.data.latent_shards import LatentShards
from drorae.data.loaders import latent_batches
from drorae.data.shard_cache import ShardCache
from drorae.store import files
from drorae.store.s3 import filesystem
from drorae.store.workspace import StageOutput
from tests.rehearsal.link import Link

WATCH_EVERY_S = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """A rank's part of a training."""

    output: StageOutput
    """Latents on S3."""
    link: Link
    """Network of its node."""
    environment: dict[str, str]
    """Keys of the S3 server."""
    folder: Path
    """Cache of its node."""
    limit_bytes: int = 0
    """Limit of the cache; 0: none."""
    order: OrderConfig
    """How an epoch is shuffled."""
    batch: int
    """Global batch."""
    num_steps: int
    """Steps to run."""
    step_s: float
    """Time that the GPU takes for a step."""
    rank: int = 0
    """This rank."""
    world_size: int = 1
    """Number of ranks."""
    seed: int = 0
    """Seed of the order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a rank measured."""

    at_s: list[float]
    """Seconds from the start to each batch."""
    read_bytes: list[int]
    """Bytes that its node had read by then."""
    wait_s: float
    """Seconds of waiting for batches after the first."""
    wall_s: float
    """Seconds after the first batch."""
    peak_bytes: int
    """Most bytes in the node's cache."""
    fetched: int
    """Shards that this rank fetched into it, repeats counted."""
    kept: int
    """Shards in it at the end."""


def run_loop(loop: Loop, start: Any, results: Any) -> None:
    """Run one rank, from the moment at which all are ready, and put what it saw into a queue."""
    os.environ.update(loop.environment, AWS_ENDPOINT_URL=loop.link.endpoint)
    fetched: list[int] = []

    def fetch(uri: str, start: int, end: int) -> bytes:
        fetched.append(start)  # 0: the beginning of a shard, where no row lies
        return files.read_range(uri, start, end)

    cache = ShardCache(loop.folder, loop.limit_bytes, fetch)
    watch = _Watch(cache)
    filesystem()  # imports the S3 client: a second that belongs to the start of a process
    start.wait()
    started_s = time.monotonic()
    before = loop.link.read_bytes
    batches = latent_batches(
        LatentShards(loop.output, cache=cache),
        seed=loop.seed,
        num_steps=loop.num_steps,
        global_batch=loop.batch,
        order=loop.order,
        rank=loop.rank,
        world_size=loop.world_size,
        threads=2,
    )
    at_s, read_bytes, wait_s, asked_s = [], [], 0.0, started_s
    for _ in batches:
        now_s = time.monotonic()
        wait_s += now_s - asked_s if at_s else 0.0
        at_s.append(now_s - started_s)
        read_bytes.append(loop.link.read_bytes - before)
        time.sleep(loop.step_s)
        asked_s = time.monotonic()
    watch.end()
    results.put(
        Seen(
            at_s=at_s,
            read_bytes=read_bytes,
            wait_s=wait_s,
            wall_s=asked_s - started_s - at_s[0],
            peak_bytes=watch.peak_bytes,
            fetched=fetched.count(0),
            kept=sum("." not in path.name for path in loop.folder.iterdir()),
        )
    )


class _Watch:
    """Looks at a cache from a thread until its end."""

    def __init__(self, cache: ShardCache) -> None:
        self.peak_bytes = 0
        self._cache = cache
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(WATCH_EVERY_S):
            self.peak_bytes = max(self.peak_bytes, self._cache.used_bytes())
