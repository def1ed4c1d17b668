"""Which candidates become rows, and in which order: by hash, never by listing or worker order.

The order is that of sha256(seed, key): adding files inserts rows and moves none past another. Under
a cap the first images of each class in that order are taken, spread over classes as evenly as their
sizes allow. Because bad and duplicate files are known only after decoding, choosing is a fixed
point: choose, decode what is new, choose again.
"""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from drorae.data.readers.candidates import Candidate


@dataclass(frozen=True, slots=True)
class Decoded:
    """What decoding one candidate gave: where its picture lies, or why there is none."""

    sha256: str
    """Digest of the source content; empty when rejected."""
    reason: str = ""
    """Why it was rejected; empty when it is fine."""
    chunk: str = ""
    """Chunk file that holds the picture."""
    row: int = -1
    """Row in that chunk."""


@dataclass(slots=True)
class Choice:
    """State of one split after a round."""

    rows: list[Candidate] = field(default_factory=list)
    """Chosen candidates in hash order."""
    pending: list[Candidate] = field(default_factory=list)
    """Those of them that are not decoded yet."""
    duplicates: dict[str, str] = field(default_factory=dict)
    """Key of a left-out candidate -> key of the equal one that is kept."""


def hash_fraction(seed: int, purpose: str, key: str) -> float:
    """Uniform number in [0, 1) that depends on seed, purpose and key alone."""
    return int.from_bytes(_hash(seed, purpose, key)[:6], "big") / 2**48


def hash_order(candidates: Iterable[Candidate], seed: int) -> list[Candidate]:
    """Candidates in the order of sha256(seed, key)."""
    return sorted(candidates, key=lambda c: _hash(seed, "order", c.key))


def _hash(seed: int, purpose: str, key: str) -> bytes:
    return hashlib.sha256(f"{purpose}/{seed}/{key}".encode()).digest()


def split_candidates(
    candidates: Iterable[Candidate], seed: int, val_fraction: float
) -> tuple[list[Candidate], list[Candidate]]:
    """Train and val in hash order: the split that a source states, else `val_fraction` by hash."""
    ordered = hash_order(candidates, seed)
    is_val = {
        c.key: c.split == "val"
        or (not c.split and hash_fraction(seed, "split", c.key) < val_fraction)
        for c in ordered
    }
    return [c for c in ordered if not is_val[c.key]], [c for c in ordered if is_val[c.key]]


def even_quotas(sizes: Mapping[str, int], cap: int | None) -> dict[str, int]:
    """Rows per class: as equal as the sizes allow, `min(cap, all)` in sum.

    A remainder that cannot be divided goes to the largest classes.
    """
    if cap is None or cap >= sum(sizes.values()):
        return dict(sizes)
    quotas, left = {}, cap
    by_size = sorted(sizes, key=lambda name: sizes[name])
    for position, name in enumerate(by_size):
        quotas[name] = min(sizes[name], left // (len(by_size) - position))
        left -= quotas[name]
    return quotas


def choose(
    ordered: Sequence[Candidate],
    decoded: Mapping[str, Decoded],
    cap: int | None,
    kept_elsewhere: Mapping[str, str] | None,
) -> Choice:
    """Choose the rows of one split from what is known so far.

    Args:
        ordered: Candidates of the split in hash order.
        decoded: Outcomes by key; those not in it count as fine.
        cap: Largest number of rows.
        kept_elsewhere: Content digest -> key of rows that another split keeps; none: duplicates are
            allowed.
    """
    usable = [c for c in ordered if c.key not in decoded or not decoded[c.key].reason]
    choice = Choice()
    while True:
        choice.rows = _capped(usable, choice.duplicates, cap)
        new = _duplicates(choice.rows, decoded, kept_elsewhere)
        if not new:
            choice.pending = [c for c in choice.rows if c.key not in decoded]
            return choice
        choice.duplicates |= new


def _capped(
    usable: Sequence[Candidate], left_out: Collection[str], cap: int | None
) -> list[Candidate]:
    sizes: dict[str, int] = defaultdict(int)
    for c in usable:
        sizes[c.class_name] += c.key not in left_out
    quotas = even_quotas(dict(sorted(sizes.items())), cap)
    rows = []
    for c in usable:
        if c.key not in left_out and quotas[c.class_name] > 0:
            quotas[c.class_name] -= 1
            rows.append(c)
    return rows


def _duplicates(
    rows: Sequence[Candidate],
    decoded: Mapping[str, Decoded],
    kept_elsewhere: Mapping[str, str] | None,
) -> dict[str, str]:
    if kept_elsewhere is None:
        return {}
    kept, found = dict(kept_elsewhere), {}
    for c in rows:
        if c.key in decoded:
            first = kept.setdefault(decoded[c.key].sha256, c.key)
            if first != c.key:
                found[c.key] = first
    return found
