"""Random crops of the training images: a new one in each epoch, a function of (seed, epoch, id).

Neither workers nor a resumed run change a crop. Source: RAE's stage 1: shorter side to `view_px`
with Pillow's bicubic filter, then a uniform random square, no flip (`Resize` and `RandomCrop` of
torchvision). Needs shards of source files, with `ShardJob.view_px`.
"""

from collections.abc import Iterable

import numpy as np
import torch

from drorae.data.decoding import decode_accepted, to_view
from drorae.data.draws import host_uniform
from drorae.data.images import DECODE_THREADS, Pictures
from drorae.data.order import ShardUse
from drorae.data.shard_cache import ShardCache
from drorae.shapes import Int, Tensor, UInt8
from drorae.store.workspace import StageOutput

STREAM = "crop"
"""Name of the draws; `draws.host_uniform`."""


class RandomCrops:
    """Crops of the training images by id and epoch.

    Args:
        output: Output of the stage `shard`.
        seed: Seed of the crops.
        cache: Where copies of remote shards lie; none: the user's cache without a limit.
        threads: Threads that decode one batch.

    Raises:
        ValueError: The shards were written without `view_px`.
    """

    def __init__(
        self,
        output: StageOutput,
        *,
        seed: int,
        cache: ShardCache | None = None,
        threads: int = DECODE_THREADS,
    ) -> None:
        counts = output.read_json("counts.json")
        if "view_px" not in counts:
            raise ValueError(
                f"shards {output.uri} hold squares only: random crops need whole images; set "
                "shard.pictures=source and shard.view_px (RAE: 1.5 times shard.resolution_px)."
            )
        self.crop_px, self.view_px = int(counts["resolution_px"]), int(counts["view_px"])
        self._seed = seed
        self._pictures = Pictures(output, "train", cache, threads)
        self.labels: np.ndarray = self._pictures.index.labels
        """Labels of all rows, int64, from the index alone."""
        self.shard_rows: tuple[int, ...] = self._pictures.index.shard_rows
        """Rows of each shard."""

    def __len__(self) -> int:
        return len(self.labels)

    def read(
        self, ids: np.ndarray, epoch: int
    ) -> tuple[UInt8[Tensor, "batch 3 height width"], Int[Tensor, " batch"]]:
        """Crops and labels of the given ids, in their order.

        Raises:
            IndexError: An id outside of the split.
        """
        ids = np.asarray(ids, dtype=np.int64)
        draws = host_uniform(self._seed, STREAM, epoch, ids, 2)

        def crop(number: int, data: memoryview) -> np.ndarray:
            image = to_view(decode_accepted(data), self.view_px)
            left, top = crop_corner(draws[number], image.size, self.crop_px)
            return np.asarray(image.crop((left, top, left + self.crop_px, top + self.crop_px)))

        pixels = self._pictures.decode(ids, self.crop_px, crop)
        return pixels, torch.from_numpy(self.labels[ids])

    def follow(self, uses: Iterable[ShardUse]) -> None:
        """Bring remote shards in this order, in the background; replaces an earlier order.

        Args:
            uses: In the order of their first step.
        """
        self._pictures.store.follow(uses)

    def reached(self, step: int) -> None:
        """Let go of the shards whose last step lies before this one."""
        self._pictures.store.reached(step)


def crop_corner(draw: np.ndarray, size: tuple[int, int], side_px: int) -> tuple[int, int]:
    """Left and top of a crop, each equally likely among all that fit.

    Args:
        draw: Two uniform numbers in [0, 1).
        size: Width and height of the picture.
        side_px: Side of the crop.
    """
    # A multiple of 2^-53 times a small number of places: the bias is below 2^-40.
    left, top = (int(u * (length - side_px + 1)) for u, length in zip(draw, size, strict=True))
    return left, top
