"""Random access to the output of the stage `latents`.

Sets that fit `keep_bytes` are kept in memory as float16; larger ones are unpacked per shard into
memory-mapped arrays.
"""

import functools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import safetensors.torch
import torch

from drorae.data.order import ShardUse
from drorae.data.unpacked import unpacked
from drorae.shapes import Float, Int, Tensor
from drorae.store import files
from drorae.store.files import default_cache_path
from drorae.store.workspace import StageOutput

SPLIT = "train"
"""Only training images feed the diffusion stages."""

KEEP_BYTES = 4 << 30
"""Latents that are kept in memory; larger sets are memory-mapped from the cache folder."""


class LatentShards:
    """Latents of the training images by id, as they are stored, and the stage's statistics.

    Args:
        output: Output of the stage `latents`.
        cache_path: Folder for memory-mapped copies; none: the user's cache.
        keep_bytes: Largest volume that is kept in memory.
    """

    def __init__(
        self,
        output: StageOutput,
        *,
        cache_path: str | Path | None = None,
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        counts = output.read_json("counts.json")
        self._output = output
        self._cache = Path(cache_path or default_cache_path())
        self._names = output.names(f"{SPLIT}/", ".parquet")
        self.shard_rows: tuple[int, ...] = tuple(counts[SPLIT]["shards"])
        self._starts = np.cumsum([0, *self.shard_rows])
        self.shape: tuple[int, int, int] = tuple(counts["shape"])
        """Channels, height, width."""
        self.has_flip = bool(counts["flip"])
        """Whether latents of mirrored images are stored too."""
        num_bytes = len(self) * int(np.prod(self.shape)) * 2 * (1 + self.has_flip)
        self._keep = num_bytes <= keep_bytes
        self._parts: dict[int, dict[str, np.ndarray]] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def follow(self, uses: Iterable[ShardUse]) -> None:
        """Shards are fetched when they are first read."""

    def reached(self, step: int) -> None:
        """Shards are kept."""

    @functools.cached_property
    def stats(self) -> dict[str, Tensor]:
        """`mean` and `var`, float32 [channels, height, width]."""
        return safetensors.torch.load(files.read_bytes(self._output.uri_of("stats.safetensors")))

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """Labels of all rows, int64."""
        return np.concatenate([self._part(part)["label"] for part in range(len(self._names))])

    def read(
        self, ids: np.ndarray, flip: np.ndarray | None = None
    ) -> tuple[Float[Tensor, "batch channels height width"], Int[Tensor, " batch"]]:
        """Latents as stored (float16) and labels, in the order of the ids.

        Args:
            ids: Rows.
            flip: For each id whether the mirrored image's latent is wanted.

        Raises:
            IndexError: An id outside of the set.
            ValueError: Mirrored latents are asked for but not stored.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self):
            raise IndexError(
                f"ids {int(ids.min())} to {int(ids.max())} are out of range: "
                f"there are {len(self)} latents."
            )
        wants_flip = np.zeros(len(ids), dtype=bool) if flip is None else flip
        if wants_flip.any() and not self.has_flip:
            raise ValueError("mirrored latents are not stored: build them with latents.flip=true.")
        values = np.empty((len(ids), *self.shape), dtype=np.float16)
        labels = np.empty(len(ids), dtype=np.int64)
        parts = np.searchsorted(self._starts, ids, side="right") - 1
        for row, (number, part) in enumerate(zip(ids.tolist(), parts.tolist(), strict=True)):
            arrays, inner = self._part(part), number - int(self._starts[part])
            values[row] = arrays["latent_flip" if wants_flip[row] else "latent"][inner]
            labels[row] = arrays["label"][inner]
        return torch.from_numpy(values), torch.from_numpy(labels)

    def _part(self, part: int) -> dict[str, np.ndarray]:
        if part not in self._parts:
            self._parts[part] = self._load(self._names[part])
        return self._parts[part]

    def _load(self, name: str) -> dict[str, np.ndarray]:
        if self._keep:
            return _arrays(self._output.local(name, self._cache))
        folder = unpacked(
            self._cache / "latents" / self._output.entry(name).sha256,
            lambda path: _unpack(self._output.local(name, self._cache), path),
        )
        return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}


def _arrays(shard: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(shard).combine_chunks()
    arrays = {"label": table["label"].to_numpy()}
    for name in table.column_names:
        if name.startswith("latent"):
            arrays[name] = table[name].chunk(0).to_numpy_ndarray()
    return arrays


def _unpack(shard: Path, folder: Path) -> None:
    for name, values in _arrays(shard).items():
        np.save(folder / f"{name}.npy", values)
