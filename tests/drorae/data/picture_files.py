"""Image files built byte by byte, with content that no library would write."""

import struct
import zlib

PNG_SIGN = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, body: bytes) -> bytes:
    crc = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def png(
    size: tuple[int, int],
    rows: bytes,
    *extra: bytes,
    bits: int = 8,
    colour_type: int = 0,
    interlace: int = 0,
    after: bytes = b"",
) -> bytes:
    """A PNG with rows as they are compressed, chunks before them and chunks after them."""
    header = struct.pack(">IIBBBBB", *size, bits, colour_type, 0, 0, interlace)
    middle = b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + after
    return PNG_SIGN + chunk(b"IHDR", header) + middle + chunk(b"IEND", b"")


def with_chunks(data: bytes, *chunks: bytes) -> bytes:
    """A PNG with more chunks after its header."""
    return data[:33] + b"".join(chunks) + data[33:]


def exif(orientation: int = 1, order: str = "<") -> bytes:
    """EXIF with an impossible resolution (-1/0) and an orientation."""
    sign = b"II*\0" if order == "<" else b"MM\0*"
    entries = struct.pack(f"{order}HHIHH", 0x0112, 3, 1, orientation, 0)
    entries += struct.pack(f"{order}HHII", 0x011A, 10, 1, 38)
    directory = struct.pack(f"{order}H", 2) + entries + bytes(4)
    return sign + struct.pack(f"{order}I", 8) + directory + struct.pack(f"{order}iI", -1, 0)


def with_segments(data: bytes, *segments: tuple[int, bytes]) -> bytes:
    """A JPEG with more segments at its start."""
    packed = [struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in segments]
    return data[:2] + b"".join(packed) + data[2:]


def tiff(
    order: str,
    size: tuple[int, int],
    pixels: bytes,
    *extra: tuple[int, int, tuple[int, ...]],
    bits: int = 8,
    photometric: int = 1,
    channels: int = 1,
) -> bytes:
    """An uncompressed TIFF: byte order `<` or `>`, and more tags (number, type, values)."""

    def directory(start: int) -> bytes:
        shorts = {256: size[0], 257: size[1], 259: 1, 262: photometric, 277: channels}
        tags = [(tag, 3, (value,)) for tag, value in {**shorts, 278: size[1]}.items()]
        tags += [(258, 3, (bits,) * channels), (273, 4, (start,)), (279, 4, (len(pixels),))]
        tags += extra
        entries, values = b"", b""
        for tag, kind, numbers in sorted(tags):
            body = struct.pack(
                order + {1: "B", 3: "H", 4: "I", 10: "i"}[kind] * len(numbers), *numbers
            )
            count = len(numbers) // 2 if kind == 10 else len(numbers)
            if len(body) > 4:
                place = 10 + 12 * len(tags) + 4 + len(values)
                values, body = values + body, struct.pack(f"{order}I", place)
            entries += struct.pack(f"{order}HHI", tag, kind, count) + body.ljust(4, b"\0")
        return struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + values

    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return head + directory(len(head + directory(0))) + pixels
