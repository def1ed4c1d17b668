"""Bytes made wrong: flips, cuts, zeros, swapped blocks, and numbers that lie in header fields."""

import struct
from collections.abc import Callable

from tests.fuzz.content import Source
from tests.fuzz.draws import Draw

BLOCK_BYTES = 512
"""Unit of swaps and repeats: a tar's own."""

NUMBERS = (0, 1, 2, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**33, 2**62, 2**63 - 1, -1, -512)


def damaged(draw: Draw, source: Source, data: bytes) -> tuple[bytes, bool]:
    """The same file after one or two accidents, and whether an entry may vanish by them unseen."""
    changed, may_lose = bytearray(data), False
    for _ in range(draw.number(1, 2)):
        if source.targets and draw.chance(0.4):
            _attack(draw, source, changed)
            may_lose = True
        else:
            kind = draw.pick(tuple(ACCIDENTS))
            ACCIDENTS[kind](draw, changed)
            may_lose |= kind in ("swap", "repeat", "erase")
            may_lose |= not source.has_header_checksums and kind != "cut"
    return bytes(changed), may_lose


def _flip(draw: Draw, data: bytearray) -> None:
    for _ in range(draw.number(1, 4) if data else 0):
        data[draw.number(0, len(data) - 1)] ^= 1 << draw.number(0, 7)


def _cut(draw: Draw, data: bytearray) -> None:
    place = draw.number(0, len(data))
    if draw.chance(0.5):
        place -= place % BLOCK_BYTES
    del data[place:]


def _zeros(draw: Draw, data: bytearray) -> None:
    place = draw.number(0, len(data))
    count = draw.pick((1, 2, 3, 4, 8, BLOCK_BYTES, 2 * BLOCK_BYTES, 3000))
    if count >= BLOCK_BYTES:
        place -= place % BLOCK_BYTES
    data[place:place] = bytes(count)


def _erase(draw: Draw, data: bytearray) -> None:
    place, count = draw.number(0, len(data)), draw.pick((4, 64, BLOCK_BYTES))
    stop = min(place + count, len(data))
    data[place:stop] = bytes(stop - place)


def _swap(draw: Draw, data: bytearray) -> None:
    blocks = len(data) // BLOCK_BYTES
    if blocks < 2:
        return
    first, second = (draw.number(0, blocks - 1) * BLOCK_BYTES for _ in range(2))
    one, two = (bytes(data[start : start + BLOCK_BYTES]) for start in (first, second))
    data[first : first + BLOCK_BYTES], data[second : second + BLOCK_BYTES] = two, one


def _repeat(draw: Draw, data: bytearray) -> None:
    start = draw.number(0, len(data) // BLOCK_BYTES) * BLOCK_BYTES
    data[start:start] = data[start : start + BLOCK_BYTES * draw.number(1, 3)]


ACCIDENTS: dict[str, Callable[[Draw, bytearray], None]] = {
    "flip": _flip,
    "cut": _cut,
    "zeros": _zeros,
    "erase": _erase,
    "swap": _swap,
    "repeat": _repeat,
}


def _attack(draw: Draw, source: Source, data: bytearray) -> None:
    """Write a number that lies, or anything at all, into a known field."""
    kind, offset, length = draw.pick(source.targets)
    number = draw.pick(NUMBERS)
    if draw.chance(0.2):
        value = draw.bytes(length)
    elif kind == "octal":
        value = _octal(number, length)
    else:
        value = struct.pack("<q", number)[:length].ljust(length, b"\0")
    if offset + length <= len(data):
        data[offset : offset + length] = value
        if source.repair and draw.chance(0.9):
            source.repair(data)


def _octal(number: int, length: int) -> bytes:
    """As a tar has it: octal digits, or base 256 for what is larger or below zero."""
    if 0 <= number < 8 ** (length - 1):
        return f"{number:0{length - 1}o}\0".encode()
    if length < 9:
        return b"7" * length
    return (b"\x80" if number >= 0 else b"\xff") + number.to_bytes(length - 1, "big", signed=True)
