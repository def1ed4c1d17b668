"""Random access to the images of one split of a shard-stage output.

Shards hold exact squares, or source files of which the square is made here, with the same pixels.
Sets whose pixels fit `keep_bytes` are decoded once and kept; of larger ones each read decodes what
it needs by a few threads (Pillow releases the interpreter lock). Random crops of training images
are in `random_crops`.
"""

import functools
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from drorae.data.decoding import decode_accepted, decode_png, to_square
from drorae.data.order import ShardUse
from drorae.data.shard_cache import ShardCache
from drorae.data.store import ShardStore
from drorae.shapes import Int, Tensor, UInt8
from drorae.store.workspace import StageOutput

KEEP_BYTES = 2 << 30
"""Pixels that are kept in memory: 10,000 images of 256 px."""

DECODE_THREADS = 4
"""Threads that decode one batch."""

CHUNK_IMAGES = 256
"""Images that are decoded at a time where all are kept."""

Decode = Callable[[int, memoryview], np.ndarray]
"""Makes a square, uint8 [side, side, 3], of the place of an id in its batch and the image file."""


class Pictures:
    """The image files of one split, decoded by threads.

    Args:
        output: Output of the stage `shard`.
        split: `train` or `val`.
        cache: Where copies of remote shards lie; none: the user's cache without a limit.
        threads: Threads that decode.

    Raises:
        ValueError: An unknown split.
    """

    def __init__(
        self, output: StageOutput, split: str, cache: ShardCache | None, threads: int
    ) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"split={split!r} is unknown: expected 'train' or 'val'.")
        self.store = ShardStore(output, split, cache)
        self.index = self.store.index
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def files(self, ids: np.ndarray) -> list[memoryview]:
        """Image files of the given rows.

        Raises:
            IndexError: An id outside of the split.
        """
        shards = self.index.shards_of(ids)
        starts, sizes = self.index.starts[ids], self.index.sizes[ids]
        places = zip(shards.tolist(), starts.tolist(), sizes.tolist(), strict=True)
        return self.store.read(list(places))

    def decode(
        self, ids: np.ndarray, side_px: int, decode: Decode
    ) -> UInt8[Tensor, "batch 3 height width"]:
        """Squares of the given rows.

        Raises:
            IndexError: An id outside of the split.
        """
        pixels = torch.empty((len(ids), 3, side_px, side_px), dtype=torch.uint8)
        rows = pixels.numpy()

        def place(number: int, data: memoryview) -> None:
            rows[number] = decode(number, data).transpose(2, 0, 1)

        list(self._pool.map(place, range(len(ids)), self.files(ids)))
        return pixels


class ImageShards:
    """Images and labels of a split by id.

    Args:
        output: Output of the stage `shard`.
        split: `train` or `val`.
        cache: Where copies of remote shards lie; none: the user's cache without a limit.
        keep_bytes: Largest pixel volume that is decoded once and kept.
        threads: Threads that decode one batch.

    Raises:
        ValueError: The output has no such split.
    """

    def __init__(
        self,
        output: StageOutput,
        split: str,
        *,
        cache: ShardCache | None = None,
        keep_bytes: int = KEEP_BYTES,
        threads: int = DECODE_THREADS,
    ) -> None:
        self._pictures = Pictures(output, split, cache, threads)
        counts = output.read_json("counts.json")
        self.split = split
        self.key = output.key
        self.resolution_px = int(counts["resolution_px"])
        self.class_names: tuple[str, ...] = tuple(counts["class_names"])
        self.labels: np.ndarray = self._pictures.index.labels
        """Labels of all rows, int64, from the index alone."""
        self.shard_rows: tuple[int, ...] = self._pictures.index.shard_rows
        """Rows of each shard."""
        self._decode_square = _square_decoder(output, self.resolution_px)
        self._keep = len(self) * 3 * self.resolution_px**2 <= keep_bytes
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.labels)

    def read(
        self, ids: np.ndarray
    ) -> tuple[UInt8[Tensor, "batch 3 height width"], Int[Tensor, " batch"]]:
        """Images and labels of the given ids, in their order.

        Raises:
            IndexError: An id outside of the split.
        """
        ids = np.asarray(ids, dtype=np.int64)
        pixels = self._kept(ids) if self._keep else self._decode(ids)
        return pixels, torch.from_numpy(self.labels[ids])

    def follow(self, uses: Iterable[ShardUse]) -> None:
        """Bring remote shards in this order, in the background; replaces an earlier order.

        Args:
            uses: In the order of their first step.
        """
        if not self._keep:
            self._pictures.store.follow(uses)

    def reached(self, step: int) -> None:
        """Let go of the shards whose last step lies before this one."""
        self._pictures.store.reached(step)

    def _kept(self, ids: np.ndarray) -> UInt8[Tensor, "batch 3 height width"]:
        self._pictures.index.shards_of(ids)  # checks them
        with self._lock:
            return self._all_pixels[torch.from_numpy(ids)]

    @functools.cached_property
    def _all_pixels(self) -> UInt8[Tensor, "rows 3 height width"]:
        pixels = torch.empty((len(self), 3, *[self.resolution_px] * 2), dtype=torch.uint8)
        for start in range(0, len(self), CHUNK_IMAGES):
            ids = np.arange(start, min(start + CHUNK_IMAGES, len(self)))
            pixels[start : start + len(ids)] = self._decode(ids)
        return pixels

    def _decode(self, ids: np.ndarray) -> UInt8[Tensor, "batch 3 height width"]:
        return self._pictures.decode(ids, self.resolution_px, self._decode_square)


def _square_decoder(output: StageOutput, side_px: int) -> Decode:
    """How the stored files become squares; its configuration says what they are."""
    settings = output.read_json("config.json")["shard"]
    if settings["pictures"] == "square":
        return lambda number, data: decode_png(data)
    crop = settings["crop"]
    return lambda number, data: np.asarray(to_square(decode_accepted(data), side_px, crop))
