"""The first directory of a TIFF file with only the entries that its pixels depend on.

Entries are fixed in size, so those that stay are moved together in place; offsets stay valid. The
reference to the next directory is cut. Source: TIFF 6.0, section 2; BigTIFF has wider fields.
"""

import struct
from dataclasses import dataclass

ESSENTIAL_TAGS = {
    *(256, 257, 258, 259, 262),  # width, length, bits, compression, photometric
    *(266, 273, 277, 278, 279, 284),  # fill order, strips, samples, planar configuration
    *(292, 293, 301, 317, 320),  # fax options, transfer function, predictor, colour map
    *(322, 323, 324, 325),  # tiles
    *(332, 333, 334, 336, 338, 339, 340, 341),  # inks, extra samples, sample format and range
    *(347, 512, 513, 514, 515, 517, 518, 519, 520, 521),  # JPEG tables
    *(529, 530, 531, 532),  # YCbCr
}
ORIENTATION, XMP, TILE_WIDTH, TILE_LENGTH = 274, 700, 322, 323
XMP_TYPES = {1, 7}
"""Bytes, or bytes of an unknown kind."""


@dataclass(frozen=True, slots=True)
class EssentialTiff:
    """A TIFF file of one page without metadata."""

    data: bytes
    """The file for the decoder."""
    exif: bytes
    """An EXIF block that states the orientation, or nothing."""
    xmp: bytes
    """The XMP packet, or nothing."""
    num_pages: int
    """Directories of the file, counted up to a limit."""
    largest_block_px: tuple[int, int] | None
    """(width, height) of a tile, which the decoder allocates whole."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Widths of the fields of a directory."""

    order: str
    count: str
    offset: str
    first: int
    """Where the offset of the first directory lies."""

    @property
    def entry_bytes(self) -> int:
        return 4 + 2 * struct.calcsize(self.offset)


def essential_tiff(data: bytes, max_pages: int) -> EssentialTiff:
    """Strip a TIFF file.

    Raises:
        struct.error: The directory is cut off.
    """
    order = "<" if data[:2] == b"II" else ">"
    is_big = 43 in data[2:4]
    layout = _Layout(order, "Q" if is_big else "H", "Q" if is_big else "I", 8 if is_big else 4)
    (start,) = struct.unpack_from(order + layout.offset, data, layout.first)
    entries = _entries(data, start, layout)
    kept = [entry for entry in entries if _tag(entry, layout) in ESSENTIAL_TAGS]
    directory = struct.pack(order + layout.count, len(kept)) + b"".join(kept)
    directory += bytes(struct.calcsize(layout.offset))
    by_tag = {_tag(entry, layout): entry for entry in entries}
    return EssentialTiff(
        data[:start] + directory + data[start + len(directory) :],
        _exif(by_tag.get(ORIENTATION), layout),
        _content(data, by_tag.get(XMP), layout),
        _num_pages(data, start, layout, max_pages),
        _tile(by_tag, layout),
    )


def _entries(data: bytes, start: int, layout: _Layout) -> list[bytes]:
    (count,) = struct.unpack_from(layout.order + layout.count, data, start)
    first, size = start + struct.calcsize(layout.count), layout.entry_bytes
    if first + count * size > len(data):
        raise struct.error("directory is cut off")
    return [data[first + i * size : first + (i + 1) * size] for i in range(count)]


def _tag(entry: bytes, layout: _Layout) -> int:
    return struct.unpack_from(f"{layout.order}H", entry)[0]


def _number(entry: bytes, layout: _Layout) -> int:
    """The value of an entry of one whole number."""
    (kind,) = struct.unpack_from(f"{layout.order}H", entry, 2)
    value = layout.order + {1: "B", 3: "H"}.get(kind, "I")
    return struct.unpack_from(value, entry, 4 + struct.calcsize(layout.offset))[0]


def _exif(entry: bytes | None, layout: _Layout) -> bytes:
    if entry is None:
        return b""
    sign = b"II*\0" if layout.order == "<" else b"MM\0*"
    value = struct.pack(f"{layout.order}HHII", ORIENTATION, 4, 1, _number(entry, layout))
    return sign + struct.pack(f"{layout.order}IH", 8, 1) + value


def _content(data: bytes, entry: bytes | None, layout: _Layout) -> bytes:
    if entry is None or struct.unpack_from(f"{layout.order}H", entry, 2)[0] not in XMP_TYPES:
        return b""
    length, start = struct.unpack_from(layout.order + 2 * layout.offset, entry, 4)
    return data[start : start + length]


def _num_pages(data: bytes, start: int, layout: _Layout, most: int) -> int:
    seen: set[int] = set()
    while start and start not in seen and len(seen) < most:
        seen.add(start)
        try:
            (count,) = struct.unpack_from(layout.order + layout.count, data, start)
            after = start + struct.calcsize(layout.count) + count * layout.entry_bytes
            (start,) = struct.unpack_from(layout.order + layout.offset, data, after)
        except struct.error:  # the reference leads nowhere
            break
    return len(seen)


def _tile(by_tag: dict[int, bytes], layout: _Layout) -> tuple[int, int] | None:
    if TILE_WIDTH not in by_tag or TILE_LENGTH not in by_tag:
        return None
    return _number(by_tag[TILE_WIDTH], layout), _number(by_tag[TILE_LENGTH], layout)
