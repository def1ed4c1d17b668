"""Latents a second that the loader delivers from a mapped array, against plain copies of rows.

The file lies in the system's cache: what is measured is the way from there into batches. Both run
in turn in one process; the plain one copies the same rows into one kept buffer and does nothing
else, so it is a limit and not a rival.
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from bench_timing import interleaved

from drorae.data.jobs import OrderConfig
from drorae.data.loaders import latent_batches
from drorae.data.order import ShardUse, epoch_ids

SHAPE = (768, 16, 16)
BATCH, ROWS_PER_SHARD = 32, 128
ORDER = OrderConfig(streams=8, window_shards=2)
ROWS = {"tiny": 256, "small": 2048, "full": 4096}
MIB = 2**20


class Mapped:
    """Rows of one file as a reader of latents gives them."""

    has_flip = False

    def __init__(self, path: Path, num_rows: int) -> None:
        self.values = np.memmap(path, np.float16, "r", shape=(num_rows, *SHAPE))
        self.shard_rows = (ROWS_PER_SHARD,) * (num_rows // ROWS_PER_SHARD)

    def follow(self, uses: Iterable[ShardUse]) -> None:
        """All is there."""

    def reached(self, step: int) -> None:
        """Nothing goes."""

    def read(
        self, ids: np.ndarray, flip: np.ndarray | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.from_numpy(self.values[ids])
        return rows, torch.zeros(len(ids), dtype=torch.long)


def rows(device: torch.device, sizes: str, repeats: int) -> Iterator[dict]:
    """One row for each number of threads."""
    with tempfile.TemporaryDirectory() as folder:
        path, num_rows = Path(folder) / "latents", ROWS[sizes]
        path.write_bytes(np.ones(num_rows * int(np.prod(SHAPE)), np.float16).tobytes())
        reader = Mapped(path, num_rows)
        for threads in (1, 2, 4):
            yield _row(reader, threads, pin=device.type == "cuda", repeats=repeats)


def _row(reader: Mapped, threads: int, *, pin: bool, repeats: int) -> dict:
    layout = (reader.shard_rows, BATCH, ORDER.streams, ORDER.window_shards)
    ids = epoch_ids(0, 0, *layout)
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
            np.take(reader.values, step, axis=0, out=kept, mode="clip")

    seconds = interleaved({"loader": deliver, "copies": copy}, repeats, torch.device("cpu"))
    return {
        "threads": threads,
        "pinned": pin,
        "latents_a_second": ids.size / seconds["loader"],
        "copies_a_second": ids.size / seconds["copies"],
        "loader_over_copies": seconds["loader"] / seconds["copies"],
        "mib_a_second": ids.size * kept[0].nbytes / MIB / seconds["loader"],
    }
