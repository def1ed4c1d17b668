"""The chunks of a PNG file that its pixels depend on, and whether all of its pixels are there.

Text, profiles, EXIF, dates and the further frames of an animation are left out, so that neither
damage in them nor a decoder's limits for them matter. Source: PNG specification, third edition.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

MAX_TEXT_BYTES = 1 << 20
"""Compressed text is read up to here, where an orientation may stand in it."""

_ADAM7 = (
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)
"""Left, top and steps of the passes of an interlaced PNG (PNG specification, section 8.2)."""

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Numbers of a pixel by colour type."""


@dataclass(frozen=True, slots=True)
class EssentialPng:
    """A PNG file of one picture without metadata."""

    data: bytes
    """The file for the decoder."""
    exif: bytes
    """EXIF, or nothing."""
    xmp: bytes
    """The XMP packet, or nothing."""
    num_frames: int
    """Pictures in the file."""


def essential_png(data: bytes) -> EssentialPng:
    """Strip a PNG file.

    Raises:
        struct.error: A chunk that is needed is cut off.
    """
    view, exif, xmp = memoryview(data), b"", b""
    kept: list[memoryview | bytes] = [view[:8]]
    places: dict[bytes, int] = {}
    for kind, start, end in _chunks(data):
        places.setdefault(kind, start)
        body = b"" if kind == b"IDAT" else data[start + 8 : end - 4]
        if kind == b"tRNS":
            kept.append(_transparency(data[:29], body, data[start:end]))
        elif kind == b"eXIf":
            exif = exif or body
        elif kind in (b"iTXt", b"zTXt", b"tEXt"):
            profile, packet = _profile_or_packet(kind, body)
            exif, xmp = exif or profile, xmp or packet
        elif not kind.isalpha() or kind[:1].isupper():
            kept.append(view[start:end])
    return EssentialPng(b"".join(kept), exif, xmp, _num_frames(data, places))


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of the chunks up to the end of the picture; what is none comes as one."""
    at, kind = 8, b""
    while at + 8 <= len(data) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length if kind.isalpha() else len(data)
        yield kind, at, end
        at = end


def _num_frames(data: bytes, places: dict[bytes, int]) -> int:
    """Pictures of an animated PNG: its frames, and its still one unless that is the first frame."""
    pixels = places.get(b"IDAT", len(data))
    if places.get(b"acTL", pixels) >= pixels:
        return 1
    (frames,) = struct.unpack_from(">I", data, places[b"acTL"] + 8)
    return frames + (places.get(b"fcTL", pixels) >= pixels) if 1 <= frames < 1 << 31 else 1


def _transparency(header: bytes, body: bytes, chunk: bytes) -> bytes:
    """The chunk with a transparent grey of 2 or 4 bits scaled as Pillow scales the pixels."""
    bits, colour_type = header[24], header[25]
    if colour_type or bits not in (2, 4) or len(body) != 2 or len(chunk) != 14:
        return chunk
    grey = struct.pack(">H", int.from_bytes(body, "big") * 255 // ((1 << bits) - 1))
    return chunk[:8] + grey + struct.pack(">I", zlib.crc32(b"tRNS" + grey))


def _profile_or_packet(kind: bytes, body: bytes) -> tuple[bytes, bytes]:
    """(EXIF, XMP) of a text chunk, empty where it holds none."""
    word, _, rest = body.partition(b"\0")
    if kind == b"iTXt" and word == b"XML:com.adobe.xmp":
        _, _, text = rest[2:].partition(b"\0")
        _, _, text = text.partition(b"\0")
        return b"", _inflated(text) if rest[:1] == b"\1" else text[:MAX_TEXT_BYTES]
    if kind != b"iTXt" and word == b"Raw profile type exif":
        text = _inflated(rest[1:]) if kind == b"zTXt" else rest[:MAX_TEXT_BYTES]
        lines = b"".join(text.split(b"\n")[3:])
        digits = re.match(rb"(?:[0-9a-fA-F]{2})*", lines)
        return bytes.fromhex(digits[0].decode() if digits else ""), b""
    return b"", b""


def _inflated(packed: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(packed, MAX_TEXT_BYTES)
    except zlib.error:
        return b""


def has_all_pixels(data: bytes) -> bool:
    """Whether the compressed pixels of a PNG fill all of its rows; inflates them once more."""
    width, height, bits, colour_type, _, _, interlace = struct.unpack_from(">IIBBBBB", data, 16)
    channels = CHANNELS[colour_type]
    passes = _ADAM7 if interlace else ((0, 0, 1, 1),)
    missing = 0
    for left, top, step_x, step_y in passes:
        columns, rows = -((left - width) // step_x), -((top - height) // step_y)
        if columns > 0 and rows > 0:
            missing += rows * (1 + (columns * bits * channels + 7) // 8)
    inflate = zlib.decompressobj()
    for kind, start, end in _chunks(data):
        packed = data[start + 8 : end - 4] if kind == b"IDAT" else b""
        while packed and missing > 0:
            missing -= len(inflate.decompress(packed, MAX_TEXT_BYTES))
            packed = inflate.unconsumed_tail
    return missing <= 0
