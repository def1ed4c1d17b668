"""How a picture has to be turned, read from EXIF or XMP that may be damaged in any way.

The decoder's own EXIF code raises, warns or rewrites on values that have nothing to do with the
orientation; here nothing else is looked at, and what cannot be read means "as it is".
"""

import re
import struct

from PIL import Image

ORIENTATION_TAG = 0x0112
MAX_ENTRIES = 1000
"""Entries of a directory that are looked at."""

_NUMBER_FORMATS = {1: "B", 3: "H", 4: "I"}
"""Types of TIFF in which writers store the orientation."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation_of(exif: bytes, xmp: bytes = b"") -> int:
    """Orientation 1 to 8 by EXIF, else by XMP, else 1."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    stated = _stated(exif)
    if stated is None:
        found = re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp)
        stated = int(found[1]) if found else 1
    return stated if stated in _TURNS else 1


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """The picture as it is meant to be seen."""
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _stated(exif: bytes) -> int | None:
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for number in range(min(count, MAX_ENTRIES)):
            place = start + 2 + 12 * number
            tag, kind = struct.unpack_from(f"{order}HH", exif, place)
            if tag == ORIENTATION_TAG and kind in _NUMBER_FORMATS:
                return struct.unpack_from(order + _NUMBER_FORMATS[kind], exif, place + 8)[0]
    except struct.error:  # cut off
        pass
    return None
