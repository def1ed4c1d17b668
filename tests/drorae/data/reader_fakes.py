"""Small archives with known content, and what is common to the tests of all readers."""

import io
import random
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from drorae.data.readers.candidates import Listing, ReadRule, to_candidates
from drorae.data.readers.source import read_records

Lister = Callable[[str, str, ReadRule], Listing]


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    archive.addfile(info, io.BytesIO(data))


def write_tar(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            add(archive, name, data)
    return path


def labels_of(listing: Listing) -> dict[str, str]:
    """Stated label by the last part of the key."""
    return {c.key.rpartition("/")[2]: c.class_name for c in to_candidates(listing.table)}


def contents_of(listing: Listing) -> dict[str, object]:
    """Content by key, or the error."""
    records = read_records(to_candidates(listing.table))
    return {r.candidate.key: r.error or r.data for r in records}


def texts_of(listing: Listing) -> str:
    """All notes, one a line; doubtful ones end in a question mark."""
    return "\n".join(note.text + "?" * note.is_doubtful for note in listing.notes)


def damaged(data: bytes, seed: int = 0) -> Iterator[bytes]:
    """A file with one changed byte in many places, and cut at every 7th byte."""
    draw = random.Random(seed)
    for place in sorted({*range(0, len(data), 193), *draw.sample(range(len(data)), 80)}):
        changed = bytearray(data)
        changed[place] ^= draw.choice((0x01, 0x80, 0xFF))
        yield bytes(changed)
    step = max(7, len(data) // 7 // 80 * 7)
    for end in range(0, len(data), step):
        yield data[:end]


def check_damage(lister: Lister, path: Path, data: bytes, known: Mapping[str, bytes]) -> None:
    """Whatever the damage: known content, an error of a row, a reject or one ValueError."""
    for changed in damaged(data):
        path.write_bytes(changed)
        try:
            listing = lister(str(path), path.name, ReadRule())
        except ValueError:  # one clear error
            continue
        assert len(listing) or listing.rejects
        found = contents_of(listing)
        assert len(found) == len(listing)
        for key, value in found.items():
            assert isinstance(value, str) or value == known.get(key, value)
