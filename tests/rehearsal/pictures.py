"""Photographs that are made up, of ImageNet's shape: about 500 x 375 pixels and 100 kB as JPEG."""

import io

import numpy as np
from PIL import Image

WIDTH_PX, HEIGHT_PX = 500, 375
QUALITY = 94
OCTAVES = (2, 4, 8, 16, 32, 64, 128)
GRAIN = 6.0  # standard deviation of the noise of single pixels, of 255


def photo(seed: int) -> np.ndarray:
    """Pixels of a made-up photograph, uint8 [height, width, 3].

    Clouds of all sizes, large ones stronger, as in photographs, and grain; sizes vary by a tenth.
    """
    draw = np.random.default_rng(seed)
    height, width = (int(side * draw.uniform(0.9, 1.1)) for side in (HEIGHT_PX, WIDTH_PX))
    total = np.full((height, width, 3), draw.uniform(80, 170, 3), np.float32)
    for cells in OCTAVES:
        coarse = draw.normal(0, 90 / cells**0.5, (cells, cells, 3)).clip(-127, 127) + 127
        layer = Image.fromarray(coarse.astype(np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        total += np.asarray(layer, np.float32) - 127
    return (total + draw.normal(0, GRAIN, total.shape)).clip(0, 255).astype(np.uint8)


def photo_jpeg(seed: int) -> bytes:
    """A made-up photograph as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(photo(seed)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
