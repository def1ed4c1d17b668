"""A few images of a source, read and decoded as stage `shard` does: what they are, what is refused.

The choice is a function of seed and keys alone, spread over splits, classes and containers. It
costs one read an image; of Parquet, whose rows are only read with their row group, at most
`MAX_GROUP_ROWS` rows.
"""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from drorae.data.checked import Candidates
from drorae.data.decoding import BadImage, Crop, ImageLimits, decode_image, to_square
from drorae.data.essentials import essentials
from drorae.data.formats import format_of
from drorae.data.orientation import orientation_of
from drorae.data.readers.candidates import LISTING_SCHEMA, Record, to_candidates
from drorae.data.readers.source import read_records

__all__ = ["SampledImage", "choose_sample", "look_at"]

MAX_GROUP_ROWS = 2000
"""Rows of Parquet row groups that are read for a sample: 230 MB at ImageNet's size."""

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


def choose_sample(candidates: Candidates, num_images: int) -> np.ndarray:
    """Positions of the images of a sample, best spread first, int64.

    Every class of a split comes once before any comes twice, and every container of a class before
    it comes twice; else by hash. Grows as n log n, in arrays.

    Args:
        candidates: All candidates.
        num_images: Images wanted.
    """
    rows = np.flatnonzero(_is_near(candidates))
    is_val = np.zeros(len(candidates.rank), np.int64)
    is_val[candidates.orders["val"]] = 1
    classes = 2 * candidates.labels[rows].astype(np.int64) + is_val[rows]
    containers = _codes(candidates, "container")[rows]
    hashed = candidates.rank[rows]
    of_both = classes * (1 + containers.max(initial=0)) + containers
    turns = _turns(classes, (hashed, _turns(of_both, (hashed,))))
    return rows[np.lexsort((hashed, turns))[:num_images]]


def _turns(groups: np.ndarray, priority: tuple[np.ndarray, ...]) -> np.ndarray:
    """Place of each row among those of its group, from 0; the last priority counts first."""
    order = np.lexsort((*priority, groups))
    ordered = groups[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    lengths = np.diff(np.append(starts, len(ordered)))
    turns = np.empty(len(groups), np.int64)
    turns[order] = np.arange(len(groups)) - np.repeat(starts, lengths)
    return turns


def _is_near(candidates: Candidates) -> np.ndarray:
    """Which candidates can be read without much else: of Parquet, rows of a few row groups."""
    kinds: Any = candidates.listing.table["kind"].combine_chunks()
    names = kinds.dictionary.to_pylist()
    near = np.array([name != "parquet" for name in names], bool)[kinds.indices.to_numpy()]
    rows = np.flatnonzero(~near)
    if not len(rows):
        return near
    units = candidates.listing.table["unit"].to_numpy()[rows].astype(np.int64)
    groups = (_codes(candidates, "container")[rows] << 32) + units
    _, number, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    first = np.full(len(sizes), len(candidates.rank))
    np.minimum.at(first, number, candidates.rank[rows])
    order = np.argsort(first)
    fits = np.cumsum(sizes[order]) <= MAX_GROUP_ROWS
    fits[0] = True
    near[rows] = np.isin(number, order[fits])
    return near


def _codes(candidates: Candidates, name: str) -> np.ndarray:
    column: Any = candidates.listing.table[name].combine_chunks()
    return column.indices.to_numpy().astype(np.int64)


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
    found: dict[str, Any] = {}
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


def counted(values: Sequence[str]) -> dict[str, int]:
    """How often each value occurs, the most frequent first."""
    names, counts = np.unique(np.array(values, object).astype(str), return_counts=True)
    order = np.lexsort((names, -counts))
    return {str(names[i]): int(counts[i]) for i in order}
