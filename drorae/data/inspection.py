"""What stage `shard` would read of a source, before any run: counts, classes, a decoded sample.

The listing, the split and the squares are those of the stage itself. Of all images only names and
labels are read; `num_images` of them are decoded (`drorae.data.inspected_sample`). Time grows with
the listing; memory by about 250 bytes an image, as in the stage.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from drorae.data.checked import Candidates
from drorae.data.decoding import ImageLimits
from drorae.data.inspected_sample import Sample, SampledImage, Spread, look_at, summarise
from drorae.data.jobs import ShardJob
from drorae.data.listing import list_images
from drorae.data.readers.candidates import Listing, Note
from drorae.data.readers.filesystem import ListingProgress, ignore_progress
from drorae.data.sample_choice import choose_sample
from drorae.data.selection import even_quotas

__all__ = ["Inspection", "inspect_source"]

SPLITS = ("train", "val")

MAX_REASONS, MAX_REJECTS, MAX_NAMES = 12, 8, 5
"""Kinds of reasons, single rejects, and classes in one sentence that an inspection names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Images of one kind of container."""

    kind: str
    """`file` (an image folder), `tar`, `zip`, `parquet` or `cifar`."""
    containers: int
    """Archives, tables, or folders that were walked."""
    images: int
    """Images in them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Images of one split before duplicates and bad files are left out."""

    name: str
    """`train` or `val`."""
    images: int
    """Images."""
    kept: int
    """Those of them that the cap of the split allows."""
    unlabelled: int
    """Images without a class."""
    classes: int
    """Classes that have images."""
    spread: Spread | None
    """Images of such a class; none if there are none."""
    class_rows: tuple[int, ...]
    """Images of each class, by label."""
    kept_rows: tuple[int, ...]
    """Those of them that the cap allows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """What stage `shard` would read."""

    source: str
    """The source."""
    val_source: str | None
    """Source of the validation images, if it is another."""
    places: tuple[Place, ...]
    """Where the images lie."""
    images: int
    """Images listed."""
    size_bytes: int | None
    """Bytes of all of them; none if nothing tells."""
    is_size_estimated: bool
    """Whether the bytes follow from the sample."""
    split_by: str
    """What makes the validation split."""
    class_names: tuple[str, ...]
    """Classes in label order."""
    splits: tuple[Split, ...]
    """Training and validation."""
    notes: tuple[Note, ...]
    """What the readers decided."""
    problems: tuple[str, ...]
    """What stage `shard` would refuse, or a generator could not learn."""
    num_rejects: int
    """Entries that were not listed."""
    reject_reasons: dict[str, int]
    """Those entries by kind of reason, the most frequent first."""
    first_rejects: tuple[tuple[str, str], ...]
    """(key, reason) of the first of them."""
    sample: Sample
    """A few images."""


def inspect_source(
    job: ShardJob,
    *,
    num_images: int = 64,
    kept_px: int = 144,
    on_progress: ListingProgress = ignore_progress,
) -> tuple[Inspection, list[SampledImage]]:
    """List what a job would read and decode a few images.

    Args:
        job: The job.
        num_images: Images to decode.
        kept_px: Side with which their squares are kept, at most.
        on_progress: Called with (folders or containers listed, in all).

    Returns:
        The inspection, and the images of its sample, best spread first.

    Raises:
        FileNotFoundError: The source does not exist.
        ValueError: It holds nothing that looks like an image, or its labels contradict each other.
        RuntimeError: An object store refused or did not answer.
    """
    listing = list_images(job, on_progress=on_progress)
    candidates = Candidates.of(listing, job.seed, job.val_fraction)
    images = look_at(
        candidates,
        choose_sample(candidates, num_images),
        limits=ImageLimits.of(job),
        side_px=job.resolution_px,
        crop=job.crop,
        kept_px=kept_px,
    )
    sample = summarise(images, job)
    size_bytes, is_estimated = _size_bytes(listing, sample)
    splits = tuple(_split(name, candidates, job) for name in SPLITS)
    inspection = Inspection(
        source=job.source,
        val_source=job.val_source,
        places=_places(listing),
        images=len(listing),
        size_bytes=size_bytes,
        is_size_estimated=is_estimated,
        split_by=_split_by(job, listing),
        class_names=tuple(listing.class_names),
        splits=splits,
        notes=listing.notes,
        problems=tuple(_problems(splits, job, listing)),
        num_rejects=len(listing.rejects),
        reject_reasons=_reasons(listing),
        first_rejects=tuple(listing.rejects[:MAX_REJECTS]),
        sample=sample,
    )
    return inspection, images


def _places(listing: Listing) -> tuple[Place, ...]:
    counts = listing.table.group_by(["kind", "container"]).aggregate([([], "count_all")])
    found: dict[str, list[int]] = {}
    for row in counts.select(["kind", "count_all"]).to_pylist():
        found.setdefault(row["kind"], []).append(row["count_all"])
    return tuple(
        Place(kind=kind, containers=len(images), images=sum(images))
        for kind, images in sorted(found.items())
    )


def _size_bytes(listing: Listing, sample: Sample) -> tuple[int | None, bool]:
    sizes = listing.table["size_bytes"].to_numpy()
    if sizes.all():
        return int(sizes.sum()), False
    if sample.file_bytes is None:
        return None, True
    return round(sample.file_bytes * len(listing)), True


def _split_by(job: ShardJob, listing: Listing) -> str:
    if job.val_source is not None:
        return "shard.val_source"
    stated = set(listing.table["split"].unique().to_pylist())
    if stated & set(SPLITS):
        return "the source" if "" not in stated else "the source, and shard.val_fraction"
    return f"shard.val_fraction={job.val_fraction:g}, by hash"


def _split(name: str, candidates: Candidates, job: ShardJob) -> Split:
    labels = candidates.labels[candidates.orders[name]]
    cap = job.max_train_images if name == "train" else job.max_val_images
    # The first number is that of images without a label, which a cap treats as a class.
    counts = np.bincount(labels + 1, minlength=1 + len(candidates.listing.class_names))
    unlabelled, rows = int(counts[0]), counts[1:]
    return Split(
        name=name,
        images=len(labels),
        kept=len(labels) if cap is None else min(cap, len(labels)),
        unlabelled=unlabelled,
        classes=int(np.count_nonzero(rows)),
        spread=Spread.of(rows[rows > 0].tolist()),
        class_rows=tuple(rows.tolist()),
        kept_rows=tuple(even_quotas(counts, cap)[1:].tolist()),
    )


def _problems(splits: Sequence[Split], job: ShardJob, listing: Listing) -> Iterator[str]:
    train, val = splits
    if not train.images:
        yield "there is no training image: stage shard would stop. Correct shard.source."
    if not val.images and job.val_source is not None:
        yield (
            f"shard.val_source={job.val_source!r} gives no validation image: stage shard "
            "would stop."
        )
    elif not val.images and job.val_fraction > 0:
        yield (
            f"shard.val_fraction={job.val_fraction:g} of {train.images:,} images leaves no "
            "validation image: stage shard would stop. Raise it, or set shard.val_source."
        )
    rows = zip(listing.class_names, train.class_rows, strict=True)
    empty = [name for name, count in rows if not count]
    if empty and train.images:
        names = ", ".join(empty[:MAX_NAMES]) + (", ..." if len(empty) > MAX_NAMES else "")
        yield f"{len(empty):,} of {len(train.class_rows):,} classes have no training image: {names}"


def _reasons(listing: Listing) -> dict[str, int]:
    counts = Counter(reason.partition(":")[0] for _, reason in listing.rejects)
    return dict(counts.most_common(MAX_REASONS))
