import random
import time

import numpy as np
import pytest
from data_fakes import encoded, pixels
from picture_files import chunk, exif, png, with_chunks, with_segments
from PIL import Image

from drorae.data.decoding import BadImage, ImageLimits, decode_accepted, decode_image

LIMITS = ImageLimits(min_side_px=1, max_aspect_ratio=1000.0, max_pixels=1_000_000)
NUM_DAMAGED = 40
MAX_S = 1.0
RGB = Image.fromarray(pixels(0, 16, 12))
GREY_16 = Image.fromarray(pixels(0, 16, 12)[:, :, 0].astype(np.uint16) * 257)

FILES = {
    "avif": encoded(RGB, "AVIF", exif=Image.Exif()),
    "bmp": encoded(RGB, "BMP"),
    "dib": encoded(RGB, "DIB"),
    "gif": encoded(RGB, "GIF"),
    "ico of bmp": encoded(RGB, "ICO", sizes=[(16, 12)], bitmap_format="bmp"),
    "ico of png": encoded(RGB, "ICO", sizes=[(16, 12)]),
    "jpeg": with_segments(encoded(RGB, "JPEG"), (0xE1, b"Exif\0\0" + exif(6))),
    "jpeg in cmyk": encoded(RGB.convert("CMYK"), "JPEG"),
    "jpeg, progressive": encoded(RGB, "JPEG", progressive=True),
    "jpeg 2000": encoded(RGB, "JPEG2000"),
    "pcx": encoded(RGB, "PCX"),
    "png": with_chunks(encoded(RGB), chunk(b"eXIf", exif(6)), chunk(b"tEXt", b"a\0b")),
    "png, interlaced": png((8, 8), bytes(79), interlace=1),
    "png of 16 bit": encoded(GREY_16),
    "png with a palette": encoded(RGB.quantize(16)),
    "ppm": encoded(RGB, "PPM"),
    "ppm as text": b"P2 8 8 255\n" + b" ".join(b"%d" % level for level in range(64)),
    "qoi": encoded(RGB, "QOI"),
    "sgi": encoded(RGB, "SGI"),
    "tga": encoded(RGB, "TGA"),
    "tga, packed": encoded(RGB, "TGA", compression="tga_rle"),
    "tiff": encoded(RGB, "TIFF"),
    "tiff of 16 bit": encoded(GREY_16, "TIFF"),
    "tiff of jpeg": encoded(RGB, "TIFF", compression="jpeg"),
    "tiff, packed": encoded(RGB, "TIFF", compression="tiff_lzw"),
    "webp": encoded(RGB, "WEBP", exif=exif(6)),
    "webp, exact": encoded(RGB, "WEBP", lossless=True),
}


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Cut off, shortened, lengthened or changed in a few bytes, half of them in the header."""
    kind, place = draw.random(), draw.randrange(len(data))
    if kind < 0.25:
        return data[:place]
    if kind < 0.35:
        return data[:place] + data[place + draw.randrange(1, 20) :]
    if kind < 0.45:
        return data[:place] + draw.randbytes(draw.randrange(1, 9)) + data[place:]
    changed = bytearray(data)
    end = draw.choice((len(data), min(len(data), 128)))
    for _ in range(draw.choice((1, 1, 2, 5))):
        changed[draw.randrange(end)] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))
    return bytes(changed)


@pytest.mark.filterwarnings("ignore")  # as in a training; only decode_image hides them by itself
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_gives_pixels_or_a_reason(name: str):
    draw = random.Random(name)
    for _ in range(NUM_DAMAGED):
        data = damaged(FILES[name], draw)
        start = time.monotonic()
        try:
            image = decode_image(data, LIMITS)
        except BadImage:
            with pytest.raises(BadImage):
                decode_accepted(data)
        else:
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(decode_accepted(data)), np.asarray(image))
        assert time.monotonic() - start < MAX_S


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_lacks_pixels_is_refused(name: str):
    data = FILES[name]
    decode_image(data, LIMITS)
    for share in (0.3, 0.5, 0.7):
        with pytest.raises(BadImage):
            decode_image(data[: int(share * len(data))], LIMITS)
