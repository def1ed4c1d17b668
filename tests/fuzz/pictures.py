"""Single pictures of every format through the decoder: exact pixels, or a reason."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from drorae.data.decoding import BadImage, decode_image
from tests.fuzz.content import LIMITS, MEMORY_WORDS, Fault, Source
from tests.fuzz.damage import damaged
from tests.fuzz.draws import Draw, encode

EXACT = ("PNG", "BMP", "TIFF", "PPM", "WEBP", "TGA", "GRAY")
"""Formats whose pixels come back as they were."""

LOSSY = ("JPEG", "GIF", "MPO", "PALETTE", "JPEG2000", "ICO", "CMYK")
"""Formats of which only the size is compared."""

SCHEMES = {"GRAY": "PNG", "PALETTE": "PNG", "CMYK": "JPEG"}


def run(draw: Draw, folder: Path, is_damaged: bool) -> None:
    """Decode one good or damaged picture.

    Raises:
        Fault: The result is wrong.
    """
    kind = draw.pick(EXACT + LOSSY)
    wanted = _shades(draw)
    data = _encoded(draw, kind, wanted)
    path = folder / f"picture.{kind.lower()}"
    if is_damaged:
        data, _ = damaged(draw, _targets(path, data), data)
    path.write_bytes(data)
    try:
        image = decode_image(data, LIMITS)
    except BadImage as error:
        if any(word in str(error) for word in MEMORY_WORDS):
            raise Fault(f"memory: {error}") from error
        if not is_damaged:
            raise Fault(f"a good {kind} is refused: {error}") from error
        return
    found = np.asarray(image)
    if image.mode != "RGB" or found.dtype != np.uint8:
        raise Fault(f"mode {image.mode}")
    if not is_damaged and kind != "ICO" and found.shape != wanted.shape:
        raise Fault(f"{kind}: {found.shape} instead of {wanted.shape}")
    if not is_damaged and kind in EXACT and not np.array_equal(found, wanted):
        raise Fault(f"{kind}: other pixels")


def _shades(draw: Draw) -> np.ndarray:
    height, width = draw.number(1, 24), draw.number(1, 24)
    return draw.rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def _encoded(draw: Draw, kind: str, shades: np.ndarray) -> bytes:
    image = Image.fromarray(shades)
    options: dict[str, object] = {"lossless": True} if kind == "WEBP" else {}
    if kind == "GRAY":
        shades[:] = shades[:, :, :1]
        image = Image.fromarray(shades[:, :, 0])
    elif kind == "PALETTE":
        image = image.quantize(16)
    elif kind == "CMYK":
        image = image.convert("CMYK")
    elif kind == "PNG" and draw.chance(0.3):
        image = image.convert("RGBA")
    elif kind == "TIFF":
        options["compression"] = draw.pick((None, "tiff_lzw", "tiff_deflate", "packbits"))
    if kind in ("PNG", "WEBP") and draw.chance(0.3):
        # An orientation that changes nothing.
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 1
        options["exif"] = exif
    data = encode(image, SCHEMES.get(kind, kind), **options)
    return _with_chunk(draw, data) if kind == "PNG" and draw.chance(0.3) else data


def _with_chunk(draw: Draw, png: bytes) -> bytes:
    """The same PNG with a chunk of metadata that is nonsense."""
    kind = draw.pick((b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"gAMA", b"pHYs", b"tIME"))
    body = draw.pick((b"", draw.bytes(9), b"a\0\0" + zlib.compress(bytes(3_000_000))))
    chunk = struct.pack(">I", len(body)) + kind + body
    return png[:33] + chunk + struct.pack(">I", zlib.crc32(kind + body)) + png[33:]


def _targets(path: Path, data: bytes) -> Source:
    """The first bytes of a picture are its header."""
    source = Source(path)
    source.targets = [("raw", place, 4) for place in range(0, min(len(data), 64), 2)]
    if data.startswith(b"\x89PNG"):
        source.repair = repair_png
    return source


def repair_png(data: bytearray) -> None:
    """Make the checksums of a PNG's chunks right."""
    place = 8
    while place + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, place)
        end = place + 8 + size
        if end + 4 > len(data):
            return
        struct.pack_into(">I", data, end, zlib.crc32(data[place + 4 : end]))
        place = end + 4
