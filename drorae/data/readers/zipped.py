"""Zip archives of images; the first folder inside the archive is the class.

The directory of an archive is read once, while listing; a member is then a range of the file, also
on an object store.
"""

import bz2
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence

from drorae.data.readers.candidates import (
    Candidate,
    Listing,
    ReadRule,
    Record,
    is_image_name,
    joined,
    listed,
    printable,
)
from drorae.data.readers.filesystem import open_file
from drorae.data.readers.ranges import Span, read_spans

READ_AHEAD_BYTES = 1 << 20

HEADER = struct.Struct("<4s5H3L2H")
"""Signature, version, flags, method, time, date, CRC, two sizes, lengths of name and extra field
(the format's section 4.3.7)."""

DESCRIPTOR = struct.Struct("<4sL")
"""Signature and CRC behind a member whose header was written before its content (4.3.9)."""

SIGNATURE, DESCRIPTOR_SIGNATURE = b"PK\x03\x04", b"PK\x07\x08"

NAME_BYTES = 4096
"""Room for the name and the extra field of a member, whose lengths only its header tells."""

ENCRYPTED_FLAG, DESCRIPTOR_FLAG = 0x1, 0x8

METHODS: dict[int, Callable[[bytes], bytes]] = {
    zipfile.ZIP_STORED: lambda data: data,
    zipfile.ZIP_DEFLATED: lambda data: zlib.decompress(data, -zlib.MAX_WBITS),
    zipfile.ZIP_BZIP2: bz2.decompress,
}
"""Compression methods that are read."""


class BadMember(Exception):
    """A member that cannot be read; the text is the reason."""


def list_zip(uri: str, name: str, rule: ReadRule) -> Listing:
    """List the images of one zip file; one common top folder around the class folders is ignored.

    Args:
        uri: The zip file.
        name: Its name inside the source; keys start with it.
        rule: Where labels are.
    """
    with open_file(uri, READ_AHEAD_BYTES) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = {i.filename: i for i in archive.infolist() if not i.is_dir()}
        except zipfile.BadZipFile as error:
            return Listing(joined([]), [(printable(name), f"zip archive is damaged: {error}")])
    images = sorted(m for m in members if is_image_name(m) and not m.startswith("__MACOSX/"))
    depth = _class_depth(images)
    table = listed(
        "zip",
        uri,
        keys=[printable(f"{name}/{member}") for member in images],
        class_names=[printable(_folder_at(member, depth)) for member in images],
        index=[members[member].header_offset for member in images],
        size_bytes=[members[member].compress_size for member in images],
        member=images,
    )
    return Listing(table, [])


def _folder_at(member: str, depth: int) -> str:
    parts = member.split("/")
    return parts[depth] if len(parts) > depth + 1 else ""


def _class_depth(images: Sequence[str]) -> int:
    tops = {member.split("/")[0] for member in images}
    wrapped = len(tops) == 1 and all(member.count("/") >= 2 for member in images)
    return 1 if wrapped else 0


def read_zip(candidates: Sequence[Candidate]) -> Iterator[Record]:
    """Read members by offset; neighbours are read together."""
    contents = read_spans(
        [
            Span(c.container, c.index, HEADER.size + NAME_BYTES + c.size_bytes, may_end_early=True)
            for c in candidates
        ]
    )
    for candidate, data in zip(candidates, contents, strict=True):
        try:
            yield Record(candidate, _content(data, candidate.size_bytes))
        except BadMember as reason:
            yield Record(candidate, None, f"zip member cannot be read: {reason}")


def _content(data: bytes | OSError, size_bytes: int) -> bytes:
    """Content of the member whose header is at the start of `data`, checked by its CRC."""
    if isinstance(data, OSError):
        raise BadMember(data.strerror or str(data))
    if len(data) < HEADER.size or not data.startswith(SIGNATURE):
        raise BadMember("its header is damaged")
    _, _, flags, method, _, _, crc, _, _, name_bytes, extra_bytes = HEADER.unpack_from(data)
    start = HEADER.size + name_bytes + extra_bytes
    packed = data[start : start + size_bytes]
    if flags & ENCRYPTED_FLAG:
        raise BadMember("it is encrypted")
    if method not in METHODS:
        raise BadMember(f"compression method {method} is none of {sorted(METHODS)}")
    if len(packed) < size_bytes:
        raise BadMember("the archive ends early")
    if flags & DESCRIPTOR_FLAG and start + size_bytes + DESCRIPTOR.size <= len(data):
        sign, crc = DESCRIPTOR.unpack_from(data, start + size_bytes)
        crc = crc if sign == DESCRIPTOR_SIGNATURE else int.from_bytes(sign, "little")
    try:
        content = METHODS[method](packed)
    except (zlib.error, OSError, ValueError) as error:
        raise BadMember(f"{type(error).__name__}: {error}") from error
    if zlib.crc32(content) != crc:
        raise BadMember("its CRC does not match")
    return content
