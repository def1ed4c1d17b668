"""Random access to the output of the stage `latents`: raw float16 rows, as they are stored.

A read copies each row once, out of the mapped shard into the batch (about 50 microseconds for 0.4
MB). Normalising is left to the device, which has `stats`.
"""

import functools
import math
from collections.abc import Iterable

import numpy as np
import safetensors.torch
import torch

from drorae.data.order import ShardUse
from drorae.data.shard_cache import ShardCache
from drorae.data.store import ShardStore
from drorae.shapes import Float, Int, Tensor
from drorae.store import files
from drorae.store.workspace import StageOutput

SPLIT = "train"
"""Only training images feed the diffusion stages."""

COLUMNS = ("latent", "latent_flip")
"""Names of the columns of a shard: of the image, and of the mirrored one."""


class LatentShards:
    """Latents of the training images by id.

    Args:
        output: Output of the stage `latents`.
        cache: Where copies of remote shards lie; none: the user's cache without a limit.
    """

    def __init__(self, output: StageOutput, *, cache: ShardCache | None = None) -> None:
        counts = output.read_json("counts.json")
        self._output = output
        self._store = ShardStore(output, SPLIT, cache)
        self.shape: tuple[int, int, int] = tuple(counts["shape"])
        """Channels, height, width."""
        self.has_flip = bool(counts["flip"])
        """Whether latents of mirrored images are stored too."""
        self.labels: np.ndarray = self._store.index.labels
        """Labels of all rows, int64, from the index alone."""
        self.shard_rows: tuple[int, ...] = self._store.index.shard_rows
        """Rows of each shard."""
        self._row_bytes = 2 * math.prod(self.shape)

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def stats(self) -> dict[str, Tensor]:
        """`mean` and `var`, float32 [channels, height, width]."""
        return safetensors.torch.load(files.read_bytes(self._output.uri_of("stats.safetensors")))

    def read(
        self,
        ids: np.ndarray,
        flip: np.ndarray | None = None,
        out: Float[Tensor, "batch channels height width"] | None = None,
    ) -> tuple[Float[Tensor, "batch channels height width"], Int[Tensor, " batch"]]:
        """Raw latents and labels, in the order of the ids.

        Args:
            ids: Rows.
            flip: For each id whether the mirrored image's latent is wanted.
            out: Where to put the latents, contiguous (pinned memory, say); none: new memory.

        Raises:
            IndexError: An id outside of the set.
            ValueError: Mirrored latents are asked for but not stored.
        """
        ids = np.asarray(ids, dtype=np.int64)
        wants_flip = np.zeros(len(ids), dtype=bool) if flip is None else np.asarray(flip)
        if wants_flip.any() and not self.has_flip:
            raise ValueError("mirrored latents are not stored: build them with latents.flip=true.")
        if out is None:
            # NumPy asks Linux for huge pages: threads that fill fresh memory then meet 25 page
            # faults a batch of 32 instead of 1300, and deliver twice as much (two threads, AMD
            # EPYC Zen 3, 2026-11-25).
            out = torch.from_numpy(np.empty((len(ids), *self.shape), np.float16))
        rows = out.numpy().reshape(len(ids), math.prod(self.shape))
        for row, data in zip(rows, self._store.read(self._places(ids, wants_flip)), strict=True):
            row[:] = np.frombuffer(data, np.float16)
        return out, torch.from_numpy(self.labels[ids])

    def follow(self, uses: Iterable[ShardUse]) -> None:
        """Bring remote shards in this order, in the background; replaces an earlier order.

        Args:
            uses: In the order of their first step.
        """
        self._store.follow(uses)

    def reached(self, step: int) -> None:
        """Let go of the shards whose last step lies before this one."""
        self._store.reached(step)

    def _places(self, ids: np.ndarray, flip: np.ndarray) -> list[tuple[int, int, int]]:
        index = self._store.index
        shards = index.shards_of(ids)
        inner = (ids - index.first_rows[shards]) * self._row_bytes
        rows = zip(shards.tolist(), inner.tolist(), flip.tolist(), strict=True)
        return [
            (shard, index.offsets[shard][COLUMNS[is_flipped]] + start, self._row_bytes)
            for shard, start, is_flipped in rows
        ]
