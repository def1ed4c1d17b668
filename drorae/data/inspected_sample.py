"""A few images of a source, read and decoded as stage `shard` does: what they are, what is refused.

It costs one read an image; of Parquet a row group each (`drorae.data.sample_choice`).
"""

import io
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from drorae.data.checked import Candidates
from drorae.data.decoding import BadImage, Crop, ImageLimits, decode_image, to_square
from drorae.data.essentials import essentials
from drorae.data.formats import format_of
from drorae.data.jobs import ShardJob
from drorae.data.orientation import orientation_of
from drorae.data.readers.candidates import LISTING_SCHEMA, Record, to_candidates
from drorae.data.readers.source import read_records

__all__ = ["Sample", "SampledImage", "Spread", "look_at", "summarise"]

UPRIGHT = 1
"""Exif's orientation of an image that needs no turning; others are larger."""

OF_PIXELS = {"format": "pixels", "mode": "RGB"}
"""Of images that their source holds as pixel arrays."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledImage:
    """One image of a sample."""

    key: str
    """Key in the shards."""
    split: str
    """`train` or `val`."""
    label: int
    """Class number; -1: unlabelled."""
    format: str = ""
    """Format of the file (`JPEG`, `PNG`), `pixels`, or empty where none is recognised."""
    mode: str = ""
    """Pillow's mode of the file (`RGB`, `CMYK`, `L`); all but RGB are converted."""
    size_bytes: int = 0
    """Length of the file; 0 of pixels."""
    width: int = 0
    """Width of the upright image in pixels; 0 if it is rejected."""
    height: int = 0
    """Height of the upright image in pixels; 0 if it is rejected."""
    is_turned: bool = False
    """Whether Exif turns or mirrors it."""
    reason: str = ""
    """Why it is rejected, else empty."""
    square: Image.Image | None = None
    """The square that a shard would hold, or smaller."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Of some numbers the smallest, the median and the largest."""

    min: int
    """Smallest."""
    median: float
    """Median."""
    max: int
    """Largest."""

    @classmethod
    def of(cls, values: Sequence[int]) -> "Spread | None":
        """Spread of numbers; none if there are none."""
        if not values:
            return None
        return cls(min=min(values), median=float(np.median(values)), max=max(values))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What a few images are, decoded as stage `shard` does."""

    images: int
    """Images in the sample."""
    formats: dict[str, int]
    """Images by format of the file, of accepted ones and others."""
    modes: dict[str, int]
    """Accepted images by Pillow's mode; all but RGB are converted."""
    width_px: Spread | None
    """Widths of accepted images, upright."""
    height_px: Spread | None
    """Heights of accepted images, upright."""
    turned: int
    """Accepted images that Exif turns or mirrors."""
    upscaled: int
    """Accepted images of fewer pixels than the square to be made of them."""
    file_bytes: float | None
    """Mean length of a file in bytes; none where images are no files."""
    rejects: tuple[tuple[str, str], ...]
    """(key, reason) of the images that `shard` would reject."""


def look_at(
    candidates: Candidates,
    positions: np.ndarray,
    *,
    limits: ImageLimits,
    side_px: int,
    crop: Crop,
    kept_px: int,
) -> list[SampledImage]:
    """Read and decode images, in the order of their positions.

    Args:
        candidates: All candidates.
        positions: Those to look at.
        limits: What is refused.
        side_px: Side of the squares of the shards.
        crop: How an image becomes square.
        kept_px: Squares are kept with at most this side.

    Raises:
        RuntimeError: An object store refused or did not answer.
    """
    val = np.isin(positions, candidates.orders["val"])
    splits = {
        int(row): "val" if held else "train" for row, held in zip(positions, val, strict=True)
    }
    found: dict[int, SampledImage] = {}
    for plan in candidates.chunks(positions, len(positions)):
        rows = plan["position"].to_pylist()
        records = read_records(to_candidates(plan.select(LISTING_SCHEMA.names)))
        for row, record in zip(rows, records, strict=True):
            label = int(candidates.labels[row])
            facts = _facts(record, limits)
            square = facts.pop("image", None)
            if square is not None:
                square = _small(to_square(square, side_px, crop), kept_px)
            found[row] = SampledImage(
                key=record.candidate.key, split=splits[row], label=label, square=square, **facts
            )
    return [found[int(row)] for row in positions]


def _facts(record: Record, limits: ImageLimits) -> dict[str, Any]:
    data = record.data
    if data is None:
        return {"reason": record.error}
    found: dict[str, Any]
    try:
        image = decode_image(data, limits)
        found = {"width": image.width, "height": image.height, "image": image}
    except BadImage as reason:
        found = {"reason": str(reason)}
    return found | (_header(data) if isinstance(data, bytes) else OF_PIXELS)


def _header(data: bytes) -> dict[str, Any]:
    """What the file says of itself; only what can be read without its pixels."""
    name = format_of(data)
    known: dict[str, Any] = {"size_bytes": len(data), "format": name}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = essentials(data, name)
            with Image.open(io.BytesIO(file.data), formats=(name,)) as image:
                exif = image.info.get("exif") or b""
                is_turned = (file.orientation or orientation_of(exif)) > UPRIGHT
                known |= {"mode": image.mode, "is_turned": is_turned}
    except Exception:  # Pillow's decoders raise almost any type; `decode_image` gives the reason
        return known
    return known


def _small(square: Image.Image, kept_px: int) -> Image.Image:
    if square.width <= kept_px:
        return square
    return square.resize((kept_px, kept_px), Image.Resampling.BOX)


def summarise(images: Sequence[SampledImage], job: ShardJob) -> Sample:
    """Summary of a sample.

    Args:
        images: Its images.
        job: The job; its `resolution_px` is read.
    """
    good = [image for image in images if not image.reason]
    sizes = [image.size_bytes for image in images if image.size_bytes]
    return Sample(
        images=len(images),
        formats=_counted(image.format or "unknown" for image in images),
        modes=_counted(image.mode for image in good),
        width_px=Spread.of([image.width for image in good]),
        height_px=Spread.of([image.height for image in good]),
        turned=sum(image.is_turned for image in good),
        upscaled=sum(min(image.width, image.height) < job.resolution_px for image in good),
        file_bytes=float(np.mean(sizes)) if sizes else None,
        rejects=tuple((image.key, image.reason) for image in images if image.reason),
    )


def _counted(values: Iterable[str]) -> dict[str, int]:
    """How often each value occurs, the most frequent first."""
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))
