"""What a decoder needs of an image file, without the rest.

Text, colour profiles, EXIF, previews and further frames beside the pixels are dropped before any
decoder sees the file, because damage in them, or a decoder's own limits for them, would reject good
pixels. Kept is what the pixels depend on, as it is: whether that is complete the decoder judges.
What does not even parse is handed on unchanged. Costs microseconds a file and one copy of it.
"""

import re
import struct
from dataclasses import dataclass

from drorae.data.orientation import orientation_of
from drorae.data.png_chunks import essential_png
from drorae.data.tiff_directory import essential_tiff

MAX_SCANS = 200
"""Most scans of a progressive JPEG; encoders write 10 or so, and thousands would take minutes."""
MAX_FRAMES_COUNTED = 1000
"""Where counting the frames of an animation stops."""

_MARKER = re.compile(rb"\xff[^\xff]")
"""A marker of JPEG, behind any padding."""
_STANDALONE = {0x00, 0x01, *range(0xD0, 0xD9)}
"""Markers of JPEG without a length, and the zero after an escaped 0xFF."""
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
"""Frames of JPEG that come in as many scans as the writer liked."""
_AVIF_EXIF_ITEM = re.compile(rb"(infe[\x02\x03].{7}(?:.{2})?)Exif", re.DOTALL)
"""An entry of the list of items, with identifiers of 2 or 4 bytes."""
_WEBP_METADATA_FLAGS = 0x20 | 0x08 | 0x04
"""Bits of VP8X for a colour profile, EXIF and XMP."""


@dataclass(frozen=True, slots=True)
class Essentials:
    """An image file without what its pixels do not depend on."""

    data: bytes
    """The file for the decoder."""
    orientation: int | None = None
    """1 to 8; None where only the decoder can say."""
    num_frames: int = 1
    """Pictures in the file, as far as they are counted here."""
    size_px: tuple[int, int] | None = None
    """(width, height) of formats whose decoder works before it tells them."""
    problem: str = ""
    """A reason against decoding at all."""


def essentials(data: bytes, name: str) -> Essentials:
    """Essentials of a file of the format `name`, as `format_of` calls it."""
    reader = _READERS.get(name)
    if reader is None:
        return Essentials(data)
    try:
        return reader(data)
    except (struct.error, IndexError):
        return Essentials(data)


def _jpeg(data: bytes) -> Essentials:
    view, exif, xmp, at, is_progressive = memoryview(data), b"", b"", 2, False
    kept = [view[:2]]
    while at + 4 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF or marker == 0xFF:  # junk or padding between segments
            found = _MARKER.search(data, at)
            at = found.start() if found else len(data)
            continue
        if marker in _STANDALONE:
            at += 2
            continue
        end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
        if marker in (0xD9, 0xDA) or end > len(data):
            break
        body = data[at + 4 : end]
        is_progressive |= marker in _PROGRESSIVE
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif += body[6:]
        elif marker == 0xE1 and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = body
        if _colours_depend(marker, body):
            kept.append(view[at:end])
        at = end
    kept.append(view[at:])
    problem = _too_many_scans(data, at) if is_progressive else ""
    return Essentials(b"".join(kept), orientation_of(exif, xmp), problem=problem)


def _too_many_scans(data: bytes, start: int) -> str:
    end = data.find(b"\xff\xd9", start)
    scans = data.count(b"\xff\xda", start, end if end > 0 else len(data))
    return f"{scans} scans, more than {MAX_SCANS}" if scans > MAX_SCANS else ""


def _colours_depend(marker: int, body: bytes) -> bool:
    """Whether a decoder looks at the segment: tables and frames, complete JFIF and Adobe marks."""
    if marker == 0xE0:
        return body.startswith(b"JFIF\0") and len(body) >= 14
    if marker == 0xEE:
        return body.startswith(b"Adobe") and len(body) >= 12
    return not (0xE0 <= marker <= 0xEF or marker == 0xFE)


def _png(data: bytes) -> Essentials:
    png = essential_png(data)
    return Essentials(png.data, orientation_of(png.exif, png.xmp), png.num_frames)


def _webp(data: bytes) -> Essentials:
    kept, exif, xmp, at = [], b"", b"", 12
    size, frames = None, 0
    stop = min(len(data), 8 + struct.unpack_from("<I", data, 4)[0])  # behind it lies no picture
    while at + 8 <= stop:
        kind, length = struct.unpack_from("<4sI", data, at)
        chunk = data[at : at + 8 + length + length % 2]
        if kind == b"EXIF":
            exif = chunk[8 : 8 + length]
        elif kind == b"XMP ":
            xmp = chunk[8 : 8 + length]
        elif kind != b"ICCP":
            if size is None:
                size = _webp_size(kind, chunk)
            if kind == b"VP8X" and length >= 10:
                chunk = chunk[:8] + bytes([chunk[8] & ~_WEBP_METADATA_FLAGS]) + chunk[9:]
            kept.append(chunk)
        frames += kind == b"ANMF"
        at += len(chunk)
    body = b"".join(kept)
    head = struct.pack("<4sI4s", b"RIFF", len(body) + 4, b"WEBP")
    return Essentials(head + body, orientation_of(exif, xmp), max(1, frames), size)


def _webp_size(kind: bytes, chunk: bytes) -> tuple[int, int] | None:
    if kind == b"VP8X":
        width, height = (int.from_bytes(chunk[i : i + 3], "little") + 1 for i in (12, 15))
        return width, height
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", chunk, 9)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", chunk, 14)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _gif(data: bytes) -> Essentials:
    """Frames are counted block by block; the decoder would search them all, however many."""
    at = 13 + _colour_table_bytes(data[10])
    frames = 0
    while at < len(data) and frames < MAX_FRAMES_COUNTED:
        if data[at] == 0x2C:
            frames += 1
            at += 11 + _colour_table_bytes(data[at + 9])
        elif data[at] == 0x21:
            at += 2
        elif data[at] == 0x3B:  # the end: bytes behind it are no frames
            break
        else:  # bytes between the blocks
            at += 1
            continue
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
    return Essentials(data, num_frames=max(1, frames))


def _colour_table_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _ico(data: bytes) -> Essentials:
    """The largest picture of an icon, which may be larger than the icon's own header says."""
    sizes = [(1, 1)]
    for number in range(struct.unpack_from("<H", data, 4)[0]):
        (start,) = struct.unpack_from("<I", data, 6 + 16 * number + 12)
        if data[start : start + 4] == b"\x89PNG":
            sizes.append(struct.unpack_from(">II", data, start + 16))
        else:
            width, height = struct.unpack_from("<ii", data, start + 4)
            sizes.append((width, abs(height) // 2))
    return Essentials(data, size_px=max(sizes, key=lambda size: size[0] * size[1]))


def _avif(data: bytes) -> Essentials:
    """The item with EXIF gets another type; its orientation does not count, that of the boxes."""
    return Essentials(_AVIF_EXIF_ITEM.sub(rb"\1Exi-", data[:65536]) + data[65536:])


def _tiff(data: bytes) -> Essentials:
    tiff = essential_tiff(data, MAX_FRAMES_COUNTED)
    return Essentials(
        tiff.data, orientation_of(tiff.exif, tiff.xmp), tiff.num_pages, tiff.largest_block_px
    )


_READERS = {
    "JPEG": _jpeg,
    "PNG": _png,
    "WEBP": _webp,
    "GIF": _gif,
    "ICO": _ico,
    "AVIF": _avif,
    "TIFF": _tiff,
}
