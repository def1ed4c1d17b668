"""Untrusted image bytes to a square RGB picture, and back to PNG.

Everything that can be wrong with a file ends in `BadImage` with a reason that reads the same on
every machine and rerun; nothing else may escape. What stands beside the pixels never decides:
`essentials` drops it before decoding. Model-side normalisation is not here: pictures stay uint8.

Pillow's own limit of pixels, one number for the whole process, is switched off here, because
`ImageLimits` says what is allowed; it is applied to the header, before any pixel is decoded.
"""

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from drorae.data.essentials import Essentials, essentials
from drorae.data.formats import format_of, other_content
from drorae.data.jobs import ShardJob
from drorae.data.orientation import orientation_of, upright
from drorae.data.png_chunks import has_all_pixels

Image.MAX_IMAGE_PIXELS = None

Crop = Literal["center", "resize"]
"""`center`: ADM centre crop (guided-diffusion; RAE evaluation protocol). `resize`: squash to a
square."""

PNG_COMPRESS_LEVEL, PNG_COMPRESS_TYPE = 6, 3
"""zlib's default level and Z_RLE, which seeks no matches but runs: photographs of 256 px take 8 ms
instead of 18 to 30 and 0 to 7 % fewer bytes. Fixed because the bytes of a shard must not depend on
a library default."""

BITS_16_MAX, BITS_12_MAX = 65535, 4095
"""Full scale of the integer formats above 8 bit."""

TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 258, 262, 339
WHITE_IS_ZERO, SIGNED_SAMPLES = 0, 2
"""Values of the last two tags."""

UNUSED_ALPHA = {"BMP", "DIB", "TGA", "ICO"}
"""Formats whose writers often leave a fourth byte zero that is not meant as transparency."""


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

    @classmethod
    def of(cls, job: ShardJob) -> "ImageLimits":
        """Limits of a job."""
        return cls(
            min_side_px=job.min_side_px,
            max_aspect_ratio=job.max_aspect_ratio,
            max_pixels=job.max_pixels,
        )


ANY_SIZE = ImageLimits(min_side_px=1, max_aspect_ratio=math.inf, max_pixels=1 << 31)
"""Limits of files that were checked before."""


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
        _check_size(image.size, limits)
        return image
    with warnings.catch_warnings():
        # Pillow warns where it corrects what a file says; such a file is read or refused here.
        warnings.simplefilter("ignore")
        return _decode(data, limits)


def decode_accepted(data: bytes | memoryview) -> Image.Image:
    """`decode_image` of a file that passed its checks before: the same pixels, no limits.

    For many threads at a time, which `decode_image` is not: it changes Python's warning filters.

    Raises:
        BadImage: As `decode_image`, but for the limits.
    """
    return _decode(bytes(data), ANY_SIZE)


def _decode(data: bytes, limits: ImageLimits) -> Image.Image:
    name = _known_format(data)
    file = essentials(data, name)
    _check_file(file, limits)
    with _reasons(name), Image.open(io.BytesIO(file.data), formats=(name,)) as image:
        if name != "HEIF":  # whose further pictures stand beside the main one
            _check_frames(getattr(image, "n_frames", 1))
        _check_size(image.size, limits)
        image.load()
        _check_complete(image, file.data)
        rgb = _to_rgb(image)
        return upright(rgb, file.orientation or orientation_of(image.info.get("exif") or b""))


def _check_frames(num_frames: int) -> None:
    if num_frames > 1:
        raise BadImage(f"animated or multi-page: {num_frames} frames")


def _known_format(data: bytes) -> str:
    if not data:
        raise BadImage("empty file (0 bytes)")
    name = format_of(data)
    if not name:
        other = other_content(data)
        raise BadImage(f"not an image: the content {f'is {other}' if other else _NO_FORMAT}")
    if name == "HEIF":
        _register_heif()
    return name


_NO_FORMAT = "fits no known format"


def _register_heif() -> None:
    try:
        import pillow_heif  # pyright: ignore[reportMissingImports]  # an optional extra
    except ImportError:
        raise BadImage(
            "HEIC needs the extra drorae[formats]: pip install pillow-heif, then --force shard"
        ) from None
    pillow_heif.register_heif_opener()


def _check_file(file: Essentials, limits: ImageLimits) -> None:
    if file.problem:
        raise BadImage(file.problem)
    _check_frames(file.num_frames)
    if file.size_px and file.size_px[0] * file.size_px[1] > limits.max_pixels:
        width, height = file.size_px
        raise BadImage(f"{width}x{height} is more than {limits.max_pixels} pixels")


@contextmanager
def _reasons(name: str) -> Iterator[None]:
    """Pillow's errors as reasons; only its calls belong inside, or our own mistakes would hide."""
    try:
        yield
    except BadImage:  # from a check between the calls
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"truncated or damaged: no {name} that can be read") from error
    except MemoryError as error:
        raise BadImage("needs more memory than there is") from error
    except Exception as error:  # Pillow's decoders raise almost any type on damaged input
        raise BadImage(f"truncated or damaged: {type(error).__name__}: {error}") from error


def _check_size(size_px: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size_px
    if width * height > limits.max_pixels:
        raise BadImage(f"{width}x{height} is more than {limits.max_pixels} pixels")
    if min(width, height) < limits.min_side_px:
        raise BadImage(f"{width}x{height} is smaller than {limits.min_side_px} px")
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise BadImage(f"{width}x{height} exceeds the aspect ratio {limits.max_aspect_ratio:g}")


def _check_complete(image: Image.Image, data: bytes) -> None:
    """Pillow leaves rows black where the compressed pixels of a PNG end early but properly."""
    if image.format != "PNG":
        return
    last_row = image.crop((0, image.height - 1, *image.size))
    is_black = last_row.getbbox(alpha_only=False) is None
    if (is_black or "interlace" in image.info) and not has_all_pixels(data):
        raise BadImage("truncated or damaged: the compressed pixels end before the last row")


def _to_rgb(image: Image.Image) -> Image.Image:
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F":
        raise BadImage("floating-point pixels: the value range is unknown")
    if image.mode == "I" and image.format == "TIFF":
        raise BadImage("32-bit integer pixels: the value range is unknown")
    if SIGNED_SAMPLES in tags.get(TIFF_SAMPLE_FORMAT, ()):
        raise BadImage("signed integer pixels: the value range is unknown")
    if image.mode == "LAB":
        raise BadImage("colours in CIELAB are not converted: save the image as RGB")
    if image.mode.startswith("I"):
        return _from_16_bit(image).convert("RGB")
    if image.format in UNUSED_ALPHA and _is_clear(image):
        return image.convert("RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _is_clear(image: Image.Image) -> bool:
    return image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0)


def _from_16_bit(image: Image.Image) -> Image.Image:
    levels = np.asarray(image).astype(np.float64)
    if levels.min() < 0 or levels.max() > BITS_16_MAX:
        raise BadImage("32-bit integer pixels: the value range is unknown")
    tags = getattr(image, "tag_v2", {})
    white = BITS_12_MAX if tags.get(TIFF_BITS) == (12,) else BITS_16_MAX
    if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO:
        levels = white - levels
    if "transparency" in image.info:
        levels[levels == image.info["transparency"]] = white
    return Image.fromarray(np.round(levels * (255 / white)).astype(np.uint8))


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
    image.save(
        buffer,
        format="PNG",
        compress_level=PNG_COMPRESS_LEVEL,
        compress_type=PNG_COMPRESS_TYPE,
    )
    return buffer.getvalue()


def decode_png(data: bytes | memoryview) -> np.ndarray:
    """Our own PNG back to uint8 [height, width, 3]."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)
