import struct
import sys
from types import ModuleType

import numpy as np
import pytest
from data_fakes import encoded, pixels
from picture_files import chunk, png, tiff
from PIL import Image, features

from drorae.data.decoding import BadImage, ImageLimits, decode_accepted, decode_image
from drorae.data.formats import IMAGE_SUFFIXES, SUFFIXES
from drorae.data.readers.candidates import is_image_name

LIMITS = ImageLimits(min_side_px=8, max_aspect_ratio=20.0, max_pixels=1_000_000)
RGB = Image.fromarray(pixels(0, 32, 24))
LEVELS = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
"""16 bit levels that are 0 to 255 in 8 bit."""


def decoded(data: bytes) -> np.ndarray:
    """Pixels, which both ways of decoding have to agree on."""
    image = np.asarray(decode_image(data, LIMITS))
    np.testing.assert_array_equal(np.asarray(decode_accepted(data)), image)
    return image


def reason(data: bytes) -> str:
    with pytest.raises(BadImage) as caught:
        decode_image(data, LIMITS)
    return str(caught.value)


def grey(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels.astype(np.uint8)[:, :, None], 3, axis=2)


EXACT = {
    "BMP": {},
    "DIB": {},
    "JPEG2000": {},
    "PCX": {},
    "PNG": {},
    "PPM": {},
    "QOI": {},
    "SGI": {},
    "TGA": {},
    "TIFF": {},
    "WEBP": {"lossless": True},
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_formats_give_the_pixels(name: str):
    np.testing.assert_array_equal(decoded(encoded(RGB, name, **EXACT[name])), np.asarray(RGB))


@pytest.mark.parametrize("name", ["AVIF", "JPEG", "MPO", "GIF", "WEBP"])
def test_lossy_formats_give_nearly_the_pixels(name: str):
    smooth = Image.linear_gradient("L").resize((32, 24)).convert("RGB")
    error = np.abs(decoded(encoded(smooth, name)).astype(int) - np.asarray(smooth))
    assert error.max() <= 12


def test_every_compression_of_a_tiff_gives_the_pixels():
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "lzma", "zstd"):
        data = encoded(RGB, "TIFF", compression=compression)
        np.testing.assert_array_equal(decoded(data), np.asarray(RGB))


@pytest.mark.parametrize("layout", ["png", "bmp"])
def test_an_icon_gives_its_largest_picture(layout: str):
    sizes = [(16, 16), (24, 24), (32, 32)]
    square = RGB.resize((32, 32))
    data = encoded(square, "ICO", sizes=sizes, bitmap_format=layout)
    np.testing.assert_array_equal(decoded(data), np.asarray(square))


def test_what_the_table_names_can_be_read_here():
    assert features.check("avif")
    assert features.check("jpg_2000")
    assert features.check("webp")
    assert features.check("libtiff")


def test_names_count_by_their_suffix_in_any_case():
    assert all(is_image_name(f"a/b{suffix.upper()}") for suffix in IMAGE_SUFFIXES)
    assert {".avif", ".heic", ".ico", ".jp2", ".pgm", ".qoi", ".tga"} <= IMAGE_SUFFIXES
    assert sum(map(len, SUFFIXES.values())) == len(IMAGE_SUFFIXES)
    assert not any(map(is_image_name, ("a.txt", ".png", "a/._b.png", "png", "a.pdf", "a.jpg/b")))


@pytest.mark.parametrize("wrong", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_content_decides_and_not_a_name(wrong: str):
    # decode_image is never told a name: ImageNet has a PNG that is called .JPEG.
    assert decoded(encoded(RGB, wrong)).shape == (24, 32, 3)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"\n<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
        (b"8BPS\0\1", "Photoshop"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\xff\x0a\1\2", "JPEG XL"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (bytes(2000), "zeros only"),
        (b"P5", "fits no known format"),
        (bytes(range(1, 200)), "fits no known format"),
    ],
)
def test_what_is_no_picture_is_named(data: bytes, expected: str):
    assert f"not an image: the content {'is ' if 'fits' not in expected else ''}" in reason(data)
    assert expected in reason(data)


def test_no_other_program_is_asked_and_no_other_format_read():
    for name in ("EPS", "PDF", "DDS", "ICNS", "MSP", "XBM"):
        image = RGB.convert({"MSP": "1", "XBM": "1"}.get(name, "RGB"))
        assert "not an image" in reason(encoded(image.resize((32, 32)), name))


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


def test_heic_without_its_extra_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert "HEIC needs the extra drorae[formats]" in reason(HEIC)


def test_heic_is_read_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    class Heif(Image.Image):
        n_frames = 2  # a preview beside the picture

        def __init__(self, file: object, name: str):
            super().__init__()
            self.im, self._mode, self._size = RGB.im, "RGB", RGB.size

    module = ModuleType("pillow_heif")
    vars(module)["register_heif_opener"] = lambda: Image.register_open("HEIF", Heif)
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    try:
        np.testing.assert_array_equal(decoded(HEIC), np.asarray(RGB))
    finally:
        Image.OPEN.pop("HEIF")
        Image.ID.remove("HEIF")


MODES_EXACT = ("RGB", "RGBA", "CMYK", "RGBX")


@pytest.mark.parametrize("mode", MODES_EXACT)
def test_modes_of_a_tiff_give_their_colours(mode: str):
    np.testing.assert_array_equal(decoded(encoded(RGB.convert(mode), "TIFF")), np.asarray(RGB))


def test_ycbcr_gives_its_colours_up_to_rounding():
    error = decoded(encoded(RGB.convert("YCbCr"), "TIFF")).astype(int) - np.asarray(RGB)
    assert np.abs(error).max() <= 4


def test_a_cmyk_jpeg_is_not_its_negative():
    smooth = Image.linear_gradient("L").resize((32, 24)).convert("RGB")
    error = decoded(encoded(smooth.convert("CMYK"), "JPEG")).astype(int) - np.asarray(smooth)
    assert np.abs(error).max() <= 8


@pytest.mark.parametrize("name", ["PNG", "TIFF", "BMP", "GIF", "PPM"])
def test_black_and_white_is_black_and_white(name: str):
    image = RGB.convert("1")
    np.testing.assert_array_equal(decoded(encoded(image, name)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(LEVELS)),
        encoded(Image.fromarray(LEVELS), "TIFF"),
        encoded(Image.fromarray(LEVELS), "JPEG2000"),
        tiff("<", (16, 16), LEVELS.astype("<u2").tobytes(), bits=16),
        tiff(">", (16, 16), LEVELS.astype(">u2").tobytes(), bits=16),
        tiff("<", (16, 16), (65535 - LEVELS).astype("<u2").tobytes(), bits=16, photometric=0),
        b"P5 16 16 65535\n" + LEVELS.astype(">u2").tobytes(),
        b"P5 16 16 255\n" + bytes(range(256)),
        b"P2 16 16 65535\n" + b" ".join(b"%d" % level for level in LEVELS.flat),
    ],
)
def test_grey_of_16_bit_is_scaled_to_8_bit(data: bytes):
    np.testing.assert_array_equal(decoded(data), grey(LEVELS // 257))


def test_grey_of_12_bit_is_scaled_to_8_bit():
    packed = b"\xff\xf8\x00" * 128  # 4095 and 2048 in turn
    image = decoded(tiff("<", (16, 16), packed, bits=12))
    np.testing.assert_array_equal(image, grey(np.tile([255, 128], (16, 8))))


COLOUR_16 = b"\0" + b"\x12\x12\xff\xff\0\0" * 16
"""A row of 16 bit colours."""


@pytest.mark.parametrize(
    "data",
    [
        png((16, 16), COLOUR_16 * 16, bits=16, colour_type=2),
        b"P6 16 16 65535\n" + COLOUR_16[1:] * 16,
        tiff(">", (16, 16), COLOUR_16[1:] * 16, bits=16, photometric=2, channels=3),
    ],
)
def test_colours_of_16_bit_are_scaled_to_8_bit(data: bytes):
    assert np.unique(decoded(data).reshape(-1, 3), axis=0).tolist() == [[0x12, 255, 0]]


def rows(pixel: bytes) -> bytes:
    return (b"\0" + pixel * 16) * 16


CLEAR = {
    "grey and alpha of 16 bit": png((16, 16), rows(b"\x12\x34\0\0"), bits=16, colour_type=4),
    "colour and alpha of 16 bit": png(
        (16, 16), rows(b"\x12\x34" * 3 + b"\0\0"), bits=16, colour_type=6
    ),
    "a grey of 16 bit": png((16, 16), rows(b"\x12\x34"), chunk(b"tRNS", b"\x12\x34"), bits=16),
    "a grey of 8 bit": png((16, 16), rows(b"\x12"), chunk(b"tRNS", b"\0\x12")),
    "a grey of 2 bit": png((16, 16), (b"\0" + b"\x55" * 4) * 16, chunk(b"tRNS", b"\0\1"), bits=2),
    "black": png((16, 16), (b"\0" + b"\0" * 2) * 16, chunk(b"tRNS", b"\0\0"), bits=1),
    "a colour": png((16, 16), rows(b"abc"), chunk(b"tRNS", b"\0a\0b\0c"), colour_type=2),
    "alpha of a palette": encoded(Image.new("PA", (16, 16), (0, 0)), "TIFF"),
    "grey and alpha": encoded(Image.new("LA", (16, 16), (9, 0)), "TIFF"),
    "colour and alpha": encoded(Image.new("RGBA", (16, 16), (9, 9, 9, 0)), "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", CLEAR)
def test_what_is_clear_shows_white(name: str):
    assert decoded(CLEAR[name]).min() == 255


def test_a_palette_with_alpha_shows_what_is_not_clear():
    indices = b"".join(b"\0" + bytes([0, 1]) * 8 for _ in range(16))
    palette = chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60])), chunk(b"tRNS", b"\0\xff")
    image = decoded(png((16, 16), indices, *palette, colour_type=3))
    assert image[0, :2].tolist() == [[255, 255, 255], [40, 50, 60]]


@pytest.mark.parametrize("name", ["TGA", "BMP", "ICO"])
def test_a_fourth_byte_that_is_always_zero_is_no_transparency(name: str):
    options = {"bitmap_format": "bmp", "sizes": [(32, 24)]} if name == "ICO" else {}
    image = RGB.copy()
    image.putalpha(0)
    data = encoded(image, name, **options)
    np.testing.assert_array_equal(decoded(data), np.asarray(RGB))


INTEGERS = np.arange(256, dtype=np.int32).reshape(16, 16)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(Image.fromarray(INTEGERS.astype(np.float32)), "TIFF"), "floating-point"),
        (b"Pf\n9 9\n-1.0\n" + np.ones(81, "<f4").tobytes(), "floating-point"),
        (encoded(Image.fromarray(INTEGERS), "TIFF"), "32-bit integer pixels: the value range"),
        (encoded(Image.fromarray(INTEGERS - 5), "TIFF"), "32-bit integer pixels: the value range"),
        (tiff("<", (16, 16), INTEGERS.astype("<u4").tobytes(), bits=32), "32-bit integer pixels"),
        (tiff("<", (16, 16), bytes(range(256)), (339, 3, (2,))), "signed integer pixels"),
        (tiff("<", (8, 8), bytes(192), photometric=8, channels=3), "CIELAB"),
        (tiff(">", (16, 16), bytes(512), bits=16, photometric=0), "no TIFF that can be read"),
        (tiff("<", (8, 8), bytes(64), (322, 4, (1 << 20,)), (323, 4, (1 << 20,))), "pixels"),
    ],
)
def test_pixels_of_an_unknown_meaning_are_refused_by_name(data: bytes, expected: str):
    assert expected in reason(data)


def test_a_png_whose_compressed_pixels_end_early_is_refused():
    grey_rows = (b"\0" + b"\x80" * 16) * 16
    assert "end before the last row" in reason(png((16, 16), grey_rows[: 17 * 8]))
    assert decoded(png((16, 16), bytes(17 * 16))).max() == 0
    assert "truncated" in reason(png((16, 16), bytes(17 * 16 - 1)))
    assert "end before the last row" in reason(png((16, 16), bytes(17 * 15)))


@pytest.mark.parametrize("size", [(8, 8), (9, 17), (33, 8)])
def test_an_interlaced_png_needs_all_of_its_passes(size: tuple[int, int]):
    steps = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))
    num_bytes = 0
    for left, top, step_x, step_y in (*steps, (0, 1, 1, 2)):
        columns, lines = len(range(left, size[0], step_x)), len(range(top, size[1], step_y))
        num_bytes += lines * (1 + columns) if columns else 0
    assert decoded(png(size, bytes(num_bytes), interlace=1)).shape == (size[1], size[0], 3)
    assert "truncated" in reason(png(size, bytes(num_bytes - 1), interlace=1))


def test_a_tga_needs_a_header_that_makes_sense():
    data = encoded(RGB, "TGA")
    assert decoded(data[:-26]).shape == (24, 32, 3)  # version 1 has no footer
    for place, value in ((1, 1), (2, 5), (16, 12), (17, 0xC0)):
        damaged = bytearray(data)
        damaged[place] = value
        assert "not an image" in reason(bytes(damaged))
    empty = data[:12] + struct.pack("<HH", 0, 24) + data[16:]
    assert "not an image" in reason(empty)
