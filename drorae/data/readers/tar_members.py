"""The members of a tar archive as extraction would leave them, without extracting.

Links are followed inside the archive, the last member of a name counts, sparse members keep their
map. Python's `tarfile` reads the headers; the walk is ours, because `TarFile.next` takes damage
for the end of an archive.
"""

import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from drorae.data.readers.damage import (
    MAX_IMAGE_BYTES,
    MAX_LABEL_BYTES,
    TOO_LONG,
    is_damage,
    reason_of,
)

BLOCK_BYTES = tarfile.BLOCKSIZE

ZEROS_AT_ONCE = 1 << 20
"""Bytes behind the end of an archive that are searched at a time."""

MAX_PIECES, MAX_STEPS = 4096, 40
"""Pieces of a sparse member, and links on the way to a file, that are followed (Linux: 40)."""

COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x1f\x9d": "compress",
    b"PK\x03\x04": "zip",
}
"""First bytes of what is no plain tar archive."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a member lie in its archive."""

    start: int
    """First byte."""
    size_bytes: int
    """Bytes stored."""
    pieces: str = ""
    """Map of a sparse member, see `expanded`."""


@dataclass(frozen=True, slots=True)
class Link:
    """A hard or symbolic link."""

    target: str | None
    """Name in the archive; none if it leads out of it."""
    text: str
    """Its target as it is written."""


Entry = Place | Link | str
"""What a name stands for; a text says why it is no file."""


@dataclass(slots=True)
class Members:
    """What was found. Grows by about 350 bytes a member, with names of 30 characters."""

    entries: dict[str, Entry] = field(default_factory=dict)
    """By name without `./`, in the order of the archive."""
    replaced: list[str] = field(default_factory=list)
    """Names once for each member that a later one replaced."""
    damage: str = ""
    """Why the archive could not be read to its end."""
    num_ends: int = 0
    """End marks: none if the archive may be cut off, several if archives were joined."""


class _Archive(tarfile.TarFile):
    """Position and state of a walk; nothing is read when it is made."""

    def next(self) -> None:
        return None


def read_members(
    file: Any, uri: str, on_file: Callable[[str, Place], None], members: Members
) -> None:
    """Walk an archive from start to end.

    Args:
        file: The archive, opened.
        uri: Where it lies.
        on_file: Called with every file when it is met; it may read there.
        members: What is found is added here; damage too.
    """
    size_bytes = file.seek(0, 2)
    file.seek(0)
    members.damage = _other_format(file.read(8), size_bytes)
    file.seek(0)
    if members.damage:
        return
    bounded: Any = _Bounded(file)
    archive: Any = _Archive(fileobj=bounded, encoding="utf-8")
    try:
        for info in _headers(archive, file, size_bytes, members):
            _add(info, on_file, members, size_bytes)
    except Exception as error:
        if not is_damage(error, uri):
            raise
        place = min(archive.offset, size_bytes)
        members.damage = f"is damaged from byte {place}: {reason_of(error)}"


class _Bounded:
    """The file as `tarfile` sees it: a damaged length does not read all of it."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


MAX_HEADER_BYTES = 16 << 20
"""Longest extended header: names have a few kB, attributes rarely a MB."""


def _other_format(head: bytes, size_bytes: int) -> str:
    if not size_bytes:
        return "is empty (0 bytes)"
    for magic, name in COMPRESSED.items():
        if head.startswith(magic):
            return (
                f"is compressed ({name}): images in it cannot be read by their place. Unpack it "
                "and give the .tar file inside"
            )
    return ""


def _headers(
    archive: Any, file: Any, size_bytes: int, members: Members
) -> Iterator[tarfile.TarInfo]:
    """Every member, with the archive's `offset` at the header that follows.

    Raises:
        tarfile.TarError: A header is damaged or the archive ends in a member.
    """
    while archive.offset < size_bytes:
        start = archive.offset
        file.seek(start)
        if not file.read(BLOCK_BYTES).strip(b"\0"):
            members.num_ends += 1
            archive.offset = _next_content(file, start, size_bytes)
            archive.pax_headers = {}
            continue
        file.seek(start)
        info = tarfile.TarInfo.fromtarfile(archive)
        if archive.offset <= start or info.size < 0:
            raise tarfile.ReadError(f"the header there states a size of {info.size} bytes")
        yield info
        if archive.offset > size_bytes and _end_of(info) > size_bytes:
            raise tarfile.ReadError(
                f"the archive ends inside {info.name!r}, its length is {size_bytes} bytes"
            )


def _next_content(file: Any, start: int, size_bytes: int) -> int:
    """First block from `start` that is not zero; the end of the file if there is none."""
    file.seek(start)
    while data := file.read(ZEROS_AT_ONCE):
        zeros = len(data) - len(data.lstrip(b"\0"))
        if zeros < len(data):
            return start + zeros // BLOCK_BYTES * BLOCK_BYTES
        start += len(data)
    return size_bytes


def _add(
    info: tarfile.TarInfo,
    on_file: Callable[[str, Place], None],
    members: Members,
    archive_bytes: int,
) -> None:
    # `path` of a sparse member may be a name that GNU tar made up.
    written = info.pax_headers.get("GNU.sparse.name", info.name)
    name = inside(written, is_member=True)
    if not name or info.isdir():
        return
    if members.entries.pop(name, None) is not None:
        members.replaced.append(name)
    entry = _entry(info, name, members.entries, archive_bytes)
    members.entries[name] = entry
    if isinstance(entry, Place):
        on_file(name, entry)


def _entry(
    info: tarfile.TarInfo, name: str, entries: dict[str, Entry], archive_bytes: int
) -> Entry:
    if info.isfile():
        place = place_of(info)
        if _end_of(info) > archive_bytes:
            return "truncated: the archive ends inside it"
        return _refusal(info) or place
    if info.islnk():
        target = inside(info.linkname, is_member=True)
        # As extraction: the file that has the name now, whatever replaces it later.
        found = entries.get(target or "")
        return found if isinstance(found, Place) else Link(target, info.linkname)
    if info.issym():
        folder = name.rpartition("/")[0]
        return Link(inside(f"{folder}/{info.linkname}", info.linkname), info.linkname)
    if info.isdev():
        return "is a device or a pipe, not a file"
    return f"is of the unknown type {info.type!r}"


def _refusal(info: tarfile.TarInfo) -> str:
    if info.size > MAX_IMAGE_BYTES:
        return TOO_LONG
    if not info.issparse():
        return ""
    pieces = _pieces(info)
    if len(pieces) > MAX_PIECES:
        return f"is sparse in {len(pieces)} pieces, more than {MAX_PIECES}"
    ends = [0, *(offset + length for offset, length in pieces)]
    starts = [*(offset for offset, _ in pieces if offset >= 0), info.size]
    is_sound = len(starts) == len(ends) and all(
        end <= start for end, start in zip(ends, starts, strict=True)
    )
    return "" if is_sound and all(n >= 0 for _, n in pieces) else "its sparse map is damaged"


def _pieces(info: tarfile.TarInfo) -> list[tuple[int, int]]:
    """Offset and length of what a sparse member stores; empty ones only mark its end."""
    pieces: Any = info.sparse or ()  # typeshed takes them for numbers
    return [piece for piece in pieces if piece[1]]


def place_of(info: tarfile.TarInfo) -> Place:
    """Where the content of a file lies."""
    if not info.issparse():
        return Place(info.offset_data, info.size)
    pieces = _pieces(info)
    text = ",".join(f"{offset}+{length}" for offset, length in pieces)
    stored = sum(length for _, length in pieces)
    return Place(info.offset_data, max(stored, 0), f"{info.size}:{text}")


def _end_of(info: tarfile.TarInfo) -> int:
    place = place_of(info)
    return place.start + place.size_bytes


def expanded(stored: bytes, pieces: str) -> bytes:
    """Content of a sparse member.

    Args:
        stored: Its pieces, one behind the other.
        pieces: `SIZE:OFFSET+LENGTH,OFFSET+LENGTH`; the bytes between are zeros.
    """
    if not pieces:
        return stored
    size, _, text = pieces.partition(":")
    content = bytearray(int(size))
    start = 0
    for piece in text.split(",") if text else ():
        offset, length = (int(number) for number in piece.split("+"))
        content[offset : offset + length] = stored[start : start + length]
        start += length
    return bytes(content)


def inside(path: str, written: str = "", *, is_member: bool = False) -> str | None:
    """A path in the archive without `.`, `..` and doubled slashes; none if it leads out of it.

    Args:
        path: The path.
        written: A link's text that is part of it; an absolute one leads out.
        is_member: Whether it is the name of a member, which extraction keeps inside.
    """
    if written.startswith("/"):
        return None
    parts: list[str] = []
    for part in path.split("/"):
        if part == ".." and not parts and not is_member:
            return None
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def followed(name: str, entries: dict[str, Entry]) -> Entry | None:
    """What a name stands for behind all links; none if the archive does not hold it."""
    target: str | None = name
    for _ in range(MAX_STEPS):
        if target is None:
            return None
        entry = entries.get(target)
        if entry is not None and not isinstance(entry, Link):
            return entry
        target = entry.target if isinstance(entry, Link) else _through_folder(target, entries)
    return None


def _through_folder(name: str, entries: dict[str, Entry]) -> str | None:
    """The same path where one of its folders is a link."""
    for folder in _parents(name):
        link = entries.get(folder)
        if isinstance(link, Link) and link.target is not None:
            return f"{link.target}{name[len(folder) :]}".lstrip("/")
    return None


def _parents(name: str) -> Iterable[str]:
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name


def read_place(file: Any, place: Place) -> bytes:
    """Content of a small member, such as a label.

    Raises:
        ValueError: It is too long.
    """
    if place.size_bytes > MAX_LABEL_BYTES:
        raise ValueError(f"longer than {MAX_LABEL_BYTES >> 20} MiB")
    file.seek(place.start)
    return expanded(file.read(place.size_bytes), place.pieces)
