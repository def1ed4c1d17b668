"""Latents a second that the loader delivers from mapped shards, against plain copies of rows.

The shards lie in the system's cache: what is measured is the way from there into batches. Both run
in turn in one process; the plain one copies the same rows into one kept buffer and does nothing
else, so it is a limit and not a rival.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from bench_timing import interleaved

from drorae.data.jobs import OrderConfig
from drorae.data.latent_shards import LatentShards
from drorae.data.loaders import latent_batches
from drorae.data.order import epoch_ids
from drorae.data.shard_format import ShardPart, part_name, write_index, write_latent_shard
from drorae.store.context import StageContext, StageResult
from drorae.store.stage_run import run_once
from drorae.store.workspace import StageOutput, Workspace

SHAPE = (768, 16, 16)
BATCH, ROWS_PER_SHARD = 32, 128
ORDER = OrderConfig(streams=8, window_shards=2)
SHARDS = {"tiny": 2, "small": 16, "full": 32}
MIB = 2**20


def rows(device: torch.device, sizes: str, repeats: int) -> Iterator[dict]:
    """One row for each number of threads."""
    with tempfile.TemporaryDirectory() as folder:
        reader = LatentShards(_stored(Path(folder), SHARDS[sizes]))
        for threads in (1, 2, 4):
            yield _row(reader, threads, pin=device.type == "cuda", repeats=repeats)


def _stored(folder: Path, num_shards: int) -> StageOutput:
    """Output of the stage `latents` with the same rows in every shard."""
    place, labels = Workspace(str(folder)), np.zeros(ROWS_PER_SHARD, np.int32)
    values = np.random.default_rng(0).random((ROWS_PER_SHARD, *SHAPE), np.float32)
    columns = {"latent": values.astype(np.float16)}
    ctx = StageContext(
        stage="latents", key="key", output_uri=place.stage_uri("latents", "key"), inputs={}
    )

    def write(number: int) -> ShardPart:
        first, name = number * ROWS_PER_SHARD, part_name("train", number)
        return write_latent_shard(ctx.output_uri, name, columns, labels, first)

    def build() -> StageResult:
        parts = [write(number) for number in range(num_shards)]
        index = write_index(ctx.output_uri, "train", parts)
        counts = ctx.put_json("counts.json", {"shape": SHAPE, "flip": False})
        return StageResult(files=[*(part.entry for part in parts), index, counts])

    return run_once(place, "latents", "key", build)[0]


def _row(reader: LatentShards, threads: int, *, pin: bool, repeats: int) -> dict:
    layout = (reader.shard_rows, BATCH, ORDER.streams, ORDER.window_shards)
    ids = epoch_ids(0, 0, *layout)
    values = reader.read(np.arange(sum(reader.shard_rows)))[0].numpy()
    kept = np.empty((BATCH, *SHAPE), np.float16)

    def deliver() -> None:
        batches = latent_batches(
            reader,
            seed=0,
            num_steps=len(ids),
            global_batch=BATCH,
            order=ORDER,
            threads=threads,
            pin=pin,
        )
        assert sum(len(batch.ids) for batch in batches) == ids.size

    def copy() -> None:
        for step in ids:
            np.take(values, step, axis=0, out=kept, mode="clip")

    seconds = interleaved({"loader": deliver, "copies": copy}, repeats, torch.device("cpu"))
    return {
        "threads": threads,
        "pinned": pin,
        "latents_a_second": ids.size / seconds["loader"],
        "copies_a_second": ids.size / seconds["copies"],
        "loader_over_copies": seconds["loader"] / seconds["copies"],
        "mib_a_second": ids.size * kept[0].nbytes / MIB / seconds["loader"],
    }
