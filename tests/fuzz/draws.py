"""Seeded choices, odd names and small pictures that differ from one another."""

import functools
import io
import unicodedata
import zlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from PIL import Image

T = TypeVar("T")

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".JPEG": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tiff": "TIFF",
    ".PNG": "PNG",
}
"""Suffixes of written pictures."""

PIECES = (
    *("a", "b", "cat", "dog", "n01440764", "7", "10", "002", "Zebra", "UPPER", "x y", "o'k", "a&b"),
    *(
        "50%",
        "a#b",
        "q?",
        "[1]",
        "(2)",
        "a=b",
        "a,b",
        'a"b',
        "-",
        "_",
        "é",
        "ü",
        "猫",
        "ß",
        "\U0001f431",
    ),
)
"""Parts of names; what is no ASCII is written composed or decomposed."""

PLAIN_STEPS = 40
"""Names are drawn from so many numbers, so that equal ones are rare and cheap to avoid."""


class Draw:
    """Choices of one iteration: a function of (seed, reader, iteration) alone."""

    def __init__(self, seed: int, reader: str, iteration: int) -> None:
        self.rng = np.random.default_rng([seed, zlib.crc32(reader.encode()), iteration])

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def number(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both possible."""
        return int(self.rng.integers(low, high + 1))

    def pick(self, values: Sequence[T]) -> T:
        return values[self.number(0, len(values) - 1)]

    def some(self, values: Sequence[T], count: int) -> list[T]:
        """Different ones, in random order."""
        order = self.rng.permutation(len(values))[:count]
        return [values[int(place)] for place in order]

    def bytes(self, count: int) -> bytes:
        return self.rng.bytes(count)


def odd_name(draw: Draw, ascii_only: bool = False) -> str:
    """A name without dots or slashes, no two of which differ in case or form alone."""
    name = "".join(draw.pick(PIECES) for _ in range(draw.number(1, 3)))
    if ascii_only:
        name = name.encode("ascii", "ignore").decode()
    name = f"{name}{draw.number(0, PLAIN_STEPS)}".strip()
    if name[1:].isdecimal() and name.startswith("-"):  # a number below zero is no label
        name = f"k{name}"
    return unicodedata.normalize(draw.pick(("NFC", "NFD")), name)


def different_names(draw: Draw, count: int, ascii_only: bool = False) -> list[str]:
    """Names that stay different when composed and folded to one case."""
    found: dict[str, str] = {}
    while len(found) < count:
        name = odd_name(draw, ascii_only)
        found.setdefault(composed(name).casefold(), name)
    return list(found.values())


def composed(name: str) -> str:
    """A name as a class: Unicode's form NFC, without spaces around it."""
    return unicodedata.normalize("NFC", name).strip(" \t\r\n\0\ufeff")


@functools.lru_cache(maxsize=4096)
def picture(number: int, suffix: str = ".png") -> bytes:
    """An encoded picture; numbers give different pixels of different sizes."""
    return encode(Image.fromarray(pixels(number)), FORMATS[suffix])


@functools.lru_cache(maxsize=512)
def pixels(number: int) -> np.ndarray:
    """RGB noise, 10 to 15 px wide and high."""
    height, width = 10 + number % 6, 10 + number // 6 % 6
    draw = np.random.default_rng(number)
    return draw.integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()
