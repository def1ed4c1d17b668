"""Random crops of the training images: a new one in each epoch, a function of (seed, epoch, id).

Neither workers nor a resumed run change a crop. Source: RAE's stage 1: shorter side to `view_px`
with Pillow's bicubic filter, then a uniform random square, no flip (`Resize` and `RandomCrop` of
torchvision). Needs shards with `ShardJob.view_px`.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from drorae.data.decoding import decode_png, to_view
from drorae.data.images import DECODE_THREADS, ImageShards, PngColumn
from drorae.data.order import ShardUse
from drorae.shapes import Int, Tensor, UInt8
from drorae.store.files import default_cache_path
from drorae.store.workspace import StageOutput

CROP_STREAM = 1
"""Highest word of the Philox counter of crops; the sample order of the same key leaves it at 0."""


class RandomCrops:
    """Crops of the training images by id and epoch.

    Args:
        output: Output of the stage `shard`.
        seed: Seed of the crops.
        cache_path: Folder for unpacked shards and copies of remote ones; none: the user's cache.

    Raises:
        ValueError: The shards were written without `view_px`.
    """

    def __init__(
        self, output: StageOutput, *, seed: int, cache_path: str | Path | None = None
    ) -> None:
        counts = output.read_json("counts.json")
        if "view_px" not in counts:
            raise ValueError(
                f"shards {output.uri} hold squares only: random crops need whole images; set "
                "shard.view_px (RAE: 1.5 times shard.resolution_px)."
            )
        self.crop_px, self.view_px = int(counts["resolution_px"]), int(counts["view_px"])
        self._seed = seed
        cache = Path(cache_path or default_cache_path())
        self._squares = ImageShards(output, "train", cache_path=cache)
        self._png = PngColumn(output, "train", "image_view", cache)
        self._pool = ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="crop")

    def __len__(self) -> int:
        return len(self._squares)

    @property
    def shard_rows(self) -> tuple[int, ...]:
        """Rows of each shard."""
        return self._squares.shard_rows

    def follow(self, uses: Iterable[ShardUse]) -> None:
        """Shards are fetched when they are first read."""

    def reached(self, step: int) -> None:
        """Shards are kept."""

    def read(
        self, ids: np.ndarray, epoch: int
    ) -> tuple[UInt8[Tensor, "batch 3 height width"], Int[Tensor, " batch"]]:
        """Crops and labels of the given ids, in their order.

        Raises:
            IndexError: An id outside of the split.
        """
        labels = torch.from_numpy(self._squares.labels[ids])
        crops = np.stack(list(self._pool.map(lambda row: self._crop(row, epoch), ids.tolist())))
        return torch.from_numpy(np.ascontiguousarray(crops.transpose(0, 3, 1, 2))), labels

    def _crop(self, row: int, epoch: int) -> np.ndarray:
        image = to_view(Image.fromarray(decode_png(self._png.read(row))), self.view_px)
        left, top = crop_corner(self._seed, epoch, row, image.size, self.crop_px)
        return np.asarray(image.crop((left, top, left + self.crop_px, top + self.crop_px)))


def crop_corner(
    seed: int, epoch: int, number: int, size: tuple[int, int], side_px: int
) -> tuple[int, int]:
    """Left and top of a sample's crop in an epoch, uniform over all that fit, by these alone.

    Args:
        seed: Seed of the run.
        epoch: Epoch, from 0.
        number: Id of the sample.
        size: Width and height of the picture.
        side_px: Side of the crop.
    """
    key = np.array([seed % 2**64, epoch % 2**64], dtype=np.uint64)
    counter = np.array([number, 0, 0, CROP_STREAM], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(2).tolist()
    # A 64-bit word times a small number of places: the bias of the high bits is below 2^-50.
    left, top = (
        word * (length - side_px + 1) >> 64 for word, length in zip(words, size, strict=True)
    )
    return left, top
