"""A source with known content, and what reading one gave."""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from drorae.data.decoding import BadImage, ImageLimits, decode_image
from drorae.data.readers.candidates import Listing, to_candidates
from drorae.data.readers.source import list_source, read_records

LIMITS = ImageLimits(min_side_px=1, max_aspect_ratio=100.0, max_pixels=1_000_000)
"""Limits of the pictures that are written here, with room."""

MEMORY_WORDS = ("MemoryError", "malloc", "realloc", "more memory", "allocation", "allocate")
"""What a reason says when memory ended: a few kB of input must not need much."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one image must come out as."""

    class_name: str
    data: bytes
    split: str = ""


@dataclass(slots=True)
class Source:
    """A written source: what must come out of it."""

    path: Path
    rows: dict[str, Row] = field(default_factory=dict)
    """By key."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Keys of image-like entries that are no row, with how often."""
    either: dict[str, Row] = field(default_factory=dict)
    """Image-like entries that may be this row or a reject, by key."""
    unreadable: set[str] = field(default_factory=set)
    """Keys of rows that are listed but hold no picture."""
    class_names: tuple[str, ...] | None = None
    """Classes in label order; None: those of the rows, sorted."""
    has_checksums: bool = False
    """Whether the container can tell that content changed."""
    has_header_checksums: bool = False
    """Whether no entry can vanish without a trace."""
    targets: list[tuple[str, int, int]] = field(default_factory=list)
    """Fields worth an attack: (kind, offset, length) in the file `path`."""
    repair: Callable[[bytearray], None] | None = None
    """Makes checksums right again after an attack."""


class Fault(AssertionError):
    """What is wrong with a result."""


@dataclass(slots=True)
class Outcome:
    """What reading a source gave."""

    listing: Listing | None
    contents: dict[str, bytes] = field(default_factory=dict)
    """Key to content, of rows that could be read."""
    errors: dict[str, str] = field(default_factory=dict)
    """Key to reason, of rows that could not."""
    error: str = ""
    """The one error that ended the listing."""


def read(source: Source) -> Outcome:
    """List and read everything; only an error that names the source may end the listing."""
    try:
        listing = list_source(str(source.path))
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        if repr(str(source.path))[1:-1] not in text and str(source.path) not in text:
            raise Fault(
                f"the error does not name the source: {type(error).__name__}: {text}"
            ) from error
        if any(word in text for word in MEMORY_WORDS):
            raise Fault(f"memory: {text}") from error
        return Outcome(None, error=text)
    outcome = Outcome(listing)
    candidates = to_candidates(listing.table)
    records = list(read_records(candidates))
    if [record.candidate for record in records] != candidates:
        raise Fault(f"{len(records)} records of {len(candidates)} candidates, or in other order")
    for record in records:
        if record.data is None:
            outcome.errors[record.candidate.key] = record.error
        else:
            outcome.contents[record.candidate.key] = bytes(record.data)
    return outcome


def check_sane(outcome: Outcome) -> None:
    """What holds for every listing, damaged or not.

    Raises:
        Fault: It does not.
    """
    if outcome.listing is None:
        return
    table, rejects = outcome.listing.table, outcome.listing.rejects
    keys = table["key"].to_pylist()
    if len(set(keys)) != len(keys):
        raise Fault(f"keys twice: {[key for key, n in Counter(keys).items() if n > 1]}")
    if keys != sorted(keys):
        raise Fault("keys are not sorted")
    classes = set(table["class_name"].to_pylist())
    names = outcome.listing.class_names
    if not classes <= set(names) or len(set(names)) != len(names):
        raise Fault(f"classes {sorted(classes)} are not among {names}")
    if set(table["split"].to_pylist()) - {"", "train", "val"}:
        raise Fault(f"splits {set(table['split'].to_pylist())}")
    reasons = [reason for _, reason in rejects] + list(outcome.errors.values())
    for reason in reasons:
        if not reason.strip():
            raise Fault("a reject without a reason")
        if any(word in reason for word in MEMORY_WORDS):
            raise Fault(f"memory: {reason}")
    _check_printable([*keys, *(key for key, _ in rejects), *reasons])


def _check_printable(texts: list[str]) -> None:
    for text in texts:
        text.encode("utf-8")


def check_clean(source: Source, outcome: Outcome) -> None:
    """Exactly the known content.

    Raises:
        Fault: With the first difference.
    """
    if outcome.listing is None:
        raise Fault(f"a good source is refused: {outcome.error}")
    check_sane(outcome)
    if outcome.errors.keys() != source.unreadable:
        raise Fault(f"cannot be read: {outcome.errors} instead of {source.unreadable}")
    table = outcome.listing.table
    found = {
        key: Row(class_name, outcome.contents.get(key, b""), split)
        for key, class_name, split in zip(
            *(table[name].to_pylist() for name in ("key", "class_name", "split")), strict=True
        )
    }
    rejects = Counter(key for key, _ in outcome.listing.rejects)
    source = _decided(source, found.keys())
    if found.keys() != source.rows.keys() or rejects != source.rejects:
        raise Fault(
            f"missing rows {sorted(source.rows.keys() - found.keys())}, too many "
            f"{sorted(found.keys() - source.rows.keys())}; missing rejects "
            f"{dict(source.rejects - rejects)}, too many {dict(rejects - source.rejects)}; "
            f"reasons {outcome.listing.rejects}"
        )
    for key, row in source.rows.items():
        got = found[key]
        if (got.class_name, got.split) != (row.class_name, row.split):
            raise Fault(
                f"{key}: class {got.class_name!r}, split {got.split!r} instead of "
                f"{row.class_name!r}, {row.split!r}"
            )
        if got.data != row.data:
            raise Fault(f"{key}: other bytes than were written")
    expected = source.class_names or class_order({row.class_name for row in source.rows.values()})
    if outcome.listing.class_names != expected:
        raise Fault(f"classes {outcome.listing.class_names} instead of {expected}")


def _decided(source: Source, keys: Collection[str]) -> Source:
    """The source with everything that may be a row or a reject as what it is."""
    rows = {key: row for key, row in source.either.items() if key in keys}
    refused = Counter(source.either.keys() - rows.keys())
    return replace(source, rows={**source.rows, **rows}, rejects=source.rejects + refused)


def class_order(names: set[str]) -> tuple[str, ...]:
    """Label order: numbers by value, else text by code point."""
    if names and all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def check_damaged(source: Source, outcome: Outcome, may_lose: bool) -> None:
    """Rows and rejects, or one error; no picture under the key of another, nothing lost silently.

    Args:
        source: What was written before the damage.
        outcome: What came out after it.
        may_lose: Whether the damage can make an entry look like no image, or like another entry,
            so that no reader could tell.

    Raises:
        Fault: It is not so.
    """
    check_sane(outcome)
    if outcome.listing is None:
        return
    keys = set(outcome.listing.table["key"].to_pylist())
    refused = {key for key, _ in outcome.listing.rejects}
    told = refused - source.rejects.keys() or any(n.is_doubtful for n in outcome.listing.notes)
    lost = (source.rows.keys() | source.rejects.keys()) - keys - refused
    whole = any(key in source.path.name for key in refused)
    if lost and not told and not whole and not may_lose:
        raise Fault(f"lost without a word: {sorted(lost)}")
    for key, data in outcome.contents.items():
        _check_content(source, key, data, may_lose)
    if source.has_checksums and source.path.suffix == ".parquet":
        _check_classes(source, outcome)


def _check_classes(source: Source, outcome: Outcome) -> None:
    """Labels that checksums cover are right, or there are none at all."""
    if outcome.listing is None:
        return
    table = outcome.listing.table
    found = dict(zip(table["key"].to_pylist(), table["class_name"].to_pylist(), strict=True))
    for key, row in source.rows.items():
        if key in outcome.contents and found[key] not in (row.class_name, "all"):
            raise Fault(f"{key}: class {found[key]!r} instead of {row.class_name!r}")


def _check_content(source: Source, key: str, data: bytes, may_lose: bool) -> None:
    row = source.rows.get(key)
    if row is None or data == row.data:
        return
    if source.has_checksums:
        raise Fault(f"{key}: other bytes than were written although the container has checksums")
    others = {other.data for other in source.rows.values()}
    if data in others and not may_lose:
        raise Fault(f"{key}: holds the picture of another row")
    try:
        decode_image(data, LIMITS)
    except BadImage as error:
        if any(word in str(error) for word in MEMORY_WORDS):
            raise Fault(f"memory: {error}") from error
