"""Random access to the images of one split of a shard-stage output.

Sets whose pixels fit `keep_bytes` are decoded once and kept. Larger ones are unpacked per shard
into one flat file of PNG bytes that is memory-mapped, and decoded on each read by a few threads
(Pillow releases the interpreter lock). Random crops of training images are in `random_crops`.
"""

import functools
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from drorae.data.decoding import decode_png
from drorae.data.order import ShardUse
from drorae.data.unpacked import unpacked
from drorae.shapes import Int, Tensor, UInt8
from drorae.store.files import default_cache_path
from drorae.store.workspace import StageOutput

KEEP_BYTES = 2 << 30
"""Pixels that are kept in memory: 10,000 images of 256 px."""

DECODE_THREADS = 4
"""Threads that decode one batch."""


class ImageShards:
    """Images and labels of a split by id.

    Args:
        output: Output of the stage `shard`.
        split: `train` or `val`.
        cache_path: Folder for unpacked shards and copies of remote ones; none: the user's cache.
        keep_bytes: Largest pixel volume that is decoded once and kept.

    Raises:
        ValueError: The output has no such split.
    """

    def __init__(
        self,
        output: StageOutput,
        split: str,
        *,
        cache_path: str | Path | None = None,
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        counts = output.read_json("counts.json")
        if split not in ("train", "val"):
            raise ValueError(f"split={split!r} is unknown: expected 'train' or 'val'.")
        self.split = split
        self.key = output.key
        self.resolution_px = int(counts["resolution_px"])
        self.class_names: tuple[str, ...] = tuple(counts["class_names"])
        self._output = output
        self._cache = Path(cache_path or default_cache_path())
        self._names = output.names(f"{split}/", ".parquet")
        self.shard_rows: tuple[int, ...] = tuple(counts[split]["shards"])
        self._starts = np.cumsum([0, *self.shard_rows])
        self._keep = len(self) * 3 * self.resolution_px**2 <= keep_bytes
        self._png = PngColumn(output, split, "image", self._cache)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="decode")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def follow(self, uses: Iterable[ShardUse]) -> None:
        """Shards are fetched when they are first read."""

    def reached(self, step: int) -> None:
        """Shards are kept."""

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """Labels of all rows, int64."""
        columns = [pq.read_table(self._local(n), columns=["label"])["label"] for n in self._names]
        parts = [column.to_numpy() for column in columns]
        return np.concatenate([np.zeros(0), *parts]).astype(np.int64)

    def read(
        self, ids: np.ndarray
    ) -> tuple[UInt8[Tensor, "batch 3 height width"], Int[Tensor, " batch"]]:
        """Images and labels of the given ids, in their order.

        Raises:
            IndexError: An id outside of the split.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self):
            raise IndexError(
                f"ids {int(ids.min())} to {int(ids.max())} are out of range: "
                f"{self.split} has {len(self)} rows."
            )
        images = self._all_pixels[ids] if self._keep else self._decode(ids)
        pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        return pixels, torch.from_numpy(self.labels[ids])

    @property
    def _all_pixels(self) -> np.ndarray:
        with self._lock:
            return self._decoded_split

    @functools.cached_property
    def _decoded_split(self) -> np.ndarray:
        shape = (len(self), self.resolution_px, self.resolution_px, 3)
        pixels = np.empty(shape, dtype=np.uint8)
        for name, start in zip(self._names, self._starts, strict=False):
            column = pq.read_table(self._local(name), columns=["image"])["image"]
            decoded = self._pool.map(decode_png, (value.as_py() for value in column))
            for row, image in enumerate(decoded):
                pixels[start + row] = image
        return pixels

    def _decode(self, ids: np.ndarray) -> np.ndarray:
        return np.stack(list(self._pool.map(self._picture, ids.tolist())))

    def _picture(self, row: int) -> np.ndarray:
        return decode_png(self._png.read(row))

    def _local(self, name: str) -> Path:
        return self._output.local(name, self._cache)


class PngColumn:
    """The PNG files of one column of a split by row, memory-mapped once a shard is first used.

    Args:
        output: Output of the stage `shard`.
        split: `train` or `val`.
        column: Its name.
        cache_path: Folder for the unpacked copies, which lie below it under the column's name.
    """

    def __init__(self, output: StageOutput, split: str, column: str, cache_path: Path) -> None:
        self._output, self._column, self._cache = output, column, cache_path
        self._names = output.names(f"{split}/", ".parquet")
        self._starts = np.cumsum([0, *output.read_json("counts.json")[split]["shards"]])
        self._parts: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def read(self, row: int) -> bytes:
        """One file; several threads may read at a time."""
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        with self._lock:
            data, offsets = self._part(part)
        row -= int(self._starts[part])
        return data[offsets[row] : offsets[row + 1]].tobytes()

    def _part(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        if part not in self._parts:
            name = self._names[part]
            folder = unpacked(
                self._cache / f"{self._column}s" / self._output.entry(name).sha256,
                lambda path: self._unpack(name, path),
            )
            offsets = np.load(folder / "offsets.npy")
            self._parts[part] = np.load(folder / "png.npy", mmap_mode="r"), offsets
        return self._parts[part]

    def _unpack(self, name: str, folder: Path) -> None:
        shard = self._output.local(name, self._cache)
        column = pq.read_table(shard, columns=[self._column])[self._column].to_pylist()
        np.save(folder / "offsets.npy", np.cumsum([0, *(len(value) for value in column)]))
        np.save(folder / "png.npy", np.frombuffer(b"".join(column), dtype=np.uint8))
