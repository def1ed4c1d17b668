"""Untrusted image bytes to a square RGB picture, and back to PNG.

Everything that can be wrong with a file ends in `BadImage` with a reason that reads the same on
every machine and rerun; nothing else may escape. Model-side normalisation is not here: pictures
stay uint8.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Crop = Literal["center", "resize"]
"""`center`: ADM centre crop (guided-diffusion; RAE evaluation protocol). `resize`: squash to a
square."""

PNG_COMPRESS_LEVEL = 6
"""zlib's default; fixed because the bytes of a shard must not depend on a library default."""

BITS_16_TO_8 = 257.0
"""65535 / 255: full scale of 16 bit onto full scale of 8 bit."""


class BadImage(Exception):
    """An image that no shard may hold; the text is the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """What an acceptable source image is."""

    min_side_px: int
    """Smallest allowed shorter side in pixels."""
    max_aspect_ratio: float
    """Largest allowed longer side / shorter side."""
    max_pixels: int
    """Largest allowed width * height, checked before any pixel is decoded (decompression bombs)."""


def decode_image(data: bytes | np.ndarray, limits: ImageLimits) -> Image.Image:
    """Decode to upright 8-bit RGB: transparency on white, 16 bit and CMYK converted.

    Args:
        data: An encoded file, or RGB pixels [height, width, 3] uint8.
        limits: Size limits.

    Raises:
        BadImage: With the reason.
    """
    if isinstance(data, np.ndarray):
        image = Image.fromarray(data)
        _check_size(image, limits)
        return image
    if not data:
        raise BadImage("empty file (0 bytes)")
    with warnings.catch_warnings():
        # Pillow warns about broken EXIF and large sizes; both are handled here.
        warnings.simplefilter("ignore")
        with _reasons(limits), Image.open(io.BytesIO(data)) as image:
            num_frames = getattr(image, "n_frames", 1)
        if num_frames > 1 and image.format != "MPO":  # a JPEG with a preview, as phones write
            raise BadImage(f"animated or multi-page: {num_frames} frames")
        _check_size(image, limits)
        with _reasons(limits), Image.open(io.BytesIO(data)) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
        return _to_rgb(upright)


def decode_accepted(data: bytes | memoryview) -> Image.Image:
    """`decode_image` of a file that passed its checks before: the same pixels, no limits.

    For many threads at a time, which `decode_image` is not: it changes Python's warning filters.
    """
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


@contextmanager
def _reasons(limits: ImageLimits) -> Iterator[None]:
    """Pillow's errors as reasons; only its calls belong inside, or our own mistakes would hide."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise BadImage("not an image: the content fits no known format") from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"more than {limits.max_pixels} pixels") from error
    except MemoryError as error:
        raise BadImage("needs more memory than there is") from error
    except Exception as error:  # Pillow's decoders raise almost any type on damaged input
        raise BadImage(f"truncated or damaged: {type(error).__name__}: {error}") from error


def _check_size(image: Image.Image, limits: ImageLimits) -> None:
    width, height = image.size
    if width * height > limits.max_pixels:
        raise BadImage(f"{width}x{height} is more than {limits.max_pixels} pixels")
    if min(width, height) < limits.min_side_px:
        raise BadImage(f"{width}x{height} is smaller than {limits.min_side_px} px")
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise BadImage(f"{width}x{height} exceeds the aspect ratio {limits.max_aspect_ratio:g}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadImage("floating-point pixels: the value range is unknown")
    if image.mode.startswith("I"):
        return _from_16_bit(image).convert("RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    levels = np.asarray(image).astype(np.float64)
    if levels.min() < 0 or levels.max() > 65535:
        raise BadImage("32-bit integer pixels: the value range is unknown")
    return Image.fromarray(np.round(levels / BITS_16_TO_8).astype(np.uint8))


def to_square(image: Image.Image, side_px: int, crop: Crop) -> Image.Image:
    """Bring a picture to `side_px` squared.

    `center`: halve with a box filter while the shorter side is at least twice the target, then
    bicubic to the target, then cut the centre. Source: ADM's preprocessing, the reference protocol
    of RAE (rounding and offsets as there).
    """
    if crop == "resize":
        return image.resize((side_px, side_px), Image.Resampling.BICUBIC)
    while min(image.size) >= 2 * side_px:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, Image.Resampling.BOX)
    scale = side_px / min(image.size)
    target = (round(image.width * scale), round(image.height * scale))
    image = image.resize(target, Image.Resampling.BICUBIC)
    left, top = (image.width - side_px) // 2, (image.height - side_px) // 2
    return image.crop((left, top, left + side_px, top + side_px))


def to_view(image: Image.Image, view_px: int) -> Image.Image:
    """Bring the shorter side of a picture to `view_px`, bicubic, aspect kept.

    Source: RAE's stage 1, torchvision `Resize(view_px)` on Pillow images; its rounding of the
    longer side.
    """
    short, long = min(image.size), max(image.size)
    if short == view_px:
        return image
    longer = int(view_px * long / short)
    size = (view_px, longer) if image.width <= image.height else (longer, view_px)
    return image.resize(size, Image.Resampling.BICUBIC)


def encode_png(image: Image.Image) -> bytes:
    """Lossless bytes, equal for equal pixels."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=PNG_COMPRESS_LEVEL)
    return buffer.getvalue()


def decode_png(data: bytes | memoryview) -> np.ndarray:
    """Our own PNG back to uint8 [height, width, 3]."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)
