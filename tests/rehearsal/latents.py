"""Checks of reading latents from S3 over a capped network, and from a local disk.

For comparison, the code of 2026-11-24 on 40 shards of 50 MB at 100 MB/s: one rank had its batches
after 90, 133 and 151 s and had then read 1,915 MB for 38 MB; eight ranks on a node had the first
one after 111 to 124 s and read 2,983 MB of a set of 2,013 MB.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from drorae.data.jobs import OrderConfig
from drorae.data.latent_shards import LatentShards
from drorae.data.loaders import latent_batches
from drorae.data.order import node_plan
from drorae.data.shard_format import part_name
from drorae.data.store import BY_RANGE_SHARE
from tests.rehearsal.bench import CAP_BYTES_S, Bench
from tests.rehearsal.line import Line
from tests.rehearsal.node import Loop, Seen

BATCH = 32
WIDE = OrderConfig(streams=8, window_shards=2)
NARROW = OrderConfig(streams=2, window_shards=2)
"""So few streams that what is open fits a fifth of 80 shards."""
CACHE_SHARE = 0.2
NODE_RANKS = 8
LOCAL_SHARDS = 16
SMALL_DIT_S = 1.47e-3
"""GPU time of one latent in a step of DiT-DH-S in TF32, 40 % of an H100's peak."""


def cold(bench: Bench) -> Iterator[Line]:
    """First batch of a node whose cache is empty."""
    window = WIDE.window_shards * bench.sizes.latent_rows * WIDE.streams // BATCH
    loop = _loop(bench, order=WIDE, num_steps=3)
    (seen,) = bench.run([loop])
    yield Line(check="cold", what="first batch after, s", measured=seen.at_s[0], bound=15)
    yield Line(
        check="cold",
        what="bytes read by then / those of the first window's shards",
        measured=seen.read_bytes[0] / sum(_needed(loop, window).values()),
        bound=1.2,
    )
    yield Line(check="cold", what="third batch after, s", measured=seen.at_s[2], bound=15)


def epoch(bench: Bench) -> Iterator[Line]:
    """An epoch with a cache of a fifth of the set, read at half of the network's rate."""
    steps = bench.num_latents // BATCH
    limit = int(CACHE_SHARE * sum(entry.size_bytes for entry in bench.latents.manifest.files))
    step_s = 2 * BATCH * bench.latent_bytes / CAP_BYTES_S
    loop = _loop(bench, order=NARROW, num_steps=steps, limit_bytes=limit, step_s=step_s)
    (seen,) = bench.run([loop])
    yield from _read_once("epoch", loop, [seen])
    yield Line(
        check="epoch",
        what=f"peak of the cache / limit, {limit / 1e6:,.0f} MB",
        measured=seen.peak_bytes / limit,
        bound=1,
    )
    yield Line(
        check="epoch",
        what="shards evicted",
        measured=seen.fetched - seen.kept,
        bound=1,
        side="at least",
    )
    yield Line(
        check="epoch",
        what="share of waiting for data, after the first batch",
        measured=seen.wait_s / seen.wall_s,
        bound=0.1,
    )


def ranks(bench: Bench) -> Iterator[Line]:
    """An epoch of eight ranks on one node."""
    batch = BATCH * NODE_RANKS // 4
    steps = bench.num_latents // batch
    step_s = 1.5 * batch * bench.latent_bytes / CAP_BYTES_S
    first = _loop(bench, order=WIDE, num_steps=steps, batch=batch, step_s=step_s)
    loops = [replace(first, rank=rank, world_size=NODE_RANKS) for rank in range(NODE_RANKS)]
    seen = bench.run(loops)
    yield from _read_once("ranks", first, seen)
    slowest = max(one.at_s[0] for one in seen)
    yield Line(check="ranks", what="first batch of all after, s", measured=slowest, bound=15)


def loader(bench: Bench) -> Iterator[Line]:
    """Latents of a local workspace, mapped."""
    folder = bench.new_folder()
    output = bench.write_latents(str(folder), LOCAL_SHARDS)
    reader = LatentShards(output)
    best_s = cpu_s = float("inf")
    for _ in range(5):  # the first one reads the disk
        wall, cpu = time.perf_counter(), time.process_time()
        steps = len(reader) // BATCH
        batches = latent_batches(reader, seed=0, num_steps=steps, global_batch=BATCH, threads=2)
        count = sum(len(batch.labels) for batch in batches)
        best_s = min(best_s, (time.perf_counter() - wall) / count)
        cpu_s = min(cpu_s, (time.process_time() - cpu) / count)
    yield Line(
        check="loader", what="latents a second", measured=1 / best_s, bound=5000, side="at least"
    )
    yield Line(
        check="loader",
        what="CPU time of a latent / GPU time in a small DiT",
        measured=cpu_s / SMALL_DIT_S,
        bound=0.25,
    )


CHECKS = {"cold": cold, "epoch": epoch, "ranks": ranks, "loader": loader}


def _loop(bench: Bench, *, batch: int = BATCH, step_s: float = 0.0, **settings: Any) -> Loop:
    """A loop on a node that no other loop has used."""
    return Loop(
        output=bench.latents,
        link=bench.new_link(),
        environment=bench.server.environment,
        folder=bench.new_folder(),
        batch=batch,
        step_s=step_s,
        seed=bench.seed,
        **settings,
    )


def _read_once(check: str, loop: Loop, seen: Sequence[Seen]) -> Iterator[Line]:
    needed = _needed(loop, loop.num_steps)
    yield Line(
        check=check,
        what="shards fetched in an epoch / shards needed",
        measured=sum(one.fetched for one in seen) / len(needed),
        bound=1,
    )
    yield Line(
        check=check,
        what="bytes read, rows ahead of their shards included / those of the shards",
        measured=max(one.read_bytes[-1] for one in seen) / sum(needed.values()),
        bound=1 + BY_RANGE_SHARE + 0.02,  # answers have headers
    )


def _needed(loop: Loop, num_steps: int) -> dict[str, int]:
    """The shards that the first steps touch, and their bytes."""
    reader = LatentShards(loop.output)
    order = (loop.batch, loop.order.streams, loop.order.window_shards)
    positions, steps = range(loop.batch), range(num_steps)
    plan = node_plan(loop.seed, reader.shard_rows, *order, positions=positions, steps=steps)
    names = {part_name("train", use.shard) for use in plan}
    return {name: loop.output.entry(name).size_bytes for name in names}
