"""Which image formats are read: their names, the suffixes of their files, and how content starts.

Written out here instead of asked of Pillow, so that every machine lists the same files. Only
formats that hold one photograph and are decoded inside this process are in the table: nothing that
runs other programs (EPS, PDF), no videos, no drawings, no scientific arrays. What a file is called
decides whether it is listed; what it holds decides how it is read.
"""

import re
import struct
from collections.abc import Callable

SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "AVIF": (".avif", ".avifs"),
    "HEIF": (".heic", ".heif", ".hif"),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
    "ICO": (".ico",),
    "PCX": (".pcx",),
    "SGI": (".sgi", ".bw", ".rgb", ".rgba"),
    "QOI": (".qoi",),
}
"""Suffixes of the files of each format, by Pillow's name of the format."""

IMAGE_SUFFIXES = frozenset(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
"""File names that count as images."""

HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
DIB_HEADER_BYTES = {12, 40, 52, 56, 64, 108, 124}
TGA_DEPTHS = {1: (8, 16), 2: (16, 24, 32), 3: (8, 16), 9: (8, 16), 10: (16, 24, 32), 11: (8, 16)}
"""Bits per pixel by image type."""
TGA_FOOTER = b"TRUEVISION-XFILE.\0"


def format_of(data: bytes) -> str:
    """Pillow's name of the format that the content has, `DIB` included; empty when it is none."""
    return next((name for name, fits in _SIGNS if fits(data)), "")


def other_content(data: bytes) -> str:
    """What content of no readable format is, for a reason; empty when it is not known either."""
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((name for sign, name in _OTHERS if re.match(sign, start)), "")


def _starts(*signs: bytes) -> Callable[[bytes], bool]:
    return lambda data: data.startswith(signs)


def _is_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def _is_dib(data: bytes) -> bool:
    return len(data) > 16 and struct.unpack_from("<I", data)[0] in DIB_HEADER_BYTES


def _brands(data: bytes) -> set[bytes]:
    """Brands of a file of ISO media boxes; the main one and the compatible ones."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(struct.unpack_from(">I", data)[0], 256, len(data) - 3)
    return {data[8:12], *(data[i : i + 4] for i in range(16, end, 4))}


def _is_avif(data: bytes) -> bool:
    return not {b"avif", b"avis"}.isdisjoint(_brands(data))


def _is_heif(data: bytes) -> bool:
    return not HEIF_BRANDS.isdisjoint(_brands(data))


def _is_tga(data: bytes) -> bool:
    """TGA has no sign at its start: every field of its header must make sense."""
    if len(data) < 19:
        return False
    kind, depth = data[2], data[16]
    width, height = struct.unpack_from("<HH", data, 12)
    if kind not in TGA_DEPTHS or depth not in TGA_DEPTHS[kind] or not width * height:
        return False
    if data[1] != (kind in (1, 9)) or data[17] & 0xC0:
        return False
    num_bytes = width * height * depth // 8
    return data.endswith(TGA_FOOTER) or kind > 8 or len(data) >= 18 + data[0] + num_bytes


def _is_pcx(data: bytes) -> bool:
    return re.match(rb"\n[\x00\x02\x03\x05]\x01[\x01\x02\x04\x08]", data) is not None


_SIGNS: tuple[tuple[str, Callable[[bytes], bool]], ...] = (
    ("JPEG", _starts(b"\xff\xd8\xff")),
    ("PNG", _starts(b"\x89PNG\r\n\x1a\n")),
    ("WEBP", _is_webp),
    ("GIF", _starts(b"GIF87a", b"GIF89a")),
    ("BMP", _starts(b"BM")),
    ("TIFF", _starts(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    ("PPM", lambda data: re.match(rb"P[1-6f][\s#]", data) is not None),
    ("JPEG2000", _starts(b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n")),
    ("AVIF", _is_avif),
    ("HEIF", _is_heif),
    ("ICO", _starts(b"\0\0\1\0")),
    ("PCX", _is_pcx),
    ("SGI", _starts(b"\x01\xda")),
    ("QOI", _starts(b"qoif")),
    ("DIB", _is_dib),
    ("TGA", _is_tga),
)

_OTHERS = (
    (rb"<!doctype html|<html|<head", "a web page"),
    (rb"<svg|<\?xml", "XML or an SVG drawing"),
    (rb"%pdf", "a PDF document"),
    (rb"%!ps|\xc5\xd0\xd3\xc6", "PostScript"),
    (rb"8bps", "a Photoshop document"),
    (rb"\xff\x0a|\0\0\0\x0cjxl ", "JPEG XL, which is not read"),
    (rb"dds ", "a DDS texture, which is not read"),
    (rb"v/1\x01|#\?radiance", "a picture of high dynamic range, which is not read"),
    (rb"pk\x03\x04|\x1f\x8b|rar!|7z\xbc", "an archive"),
    (rb"version https://git-lfs", "a Git LFS pointer: its file was never fetched"),
    (rb"\0+$", "zeros only"),
)
