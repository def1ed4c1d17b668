import io
import struct
import zlib

import numpy as np
import pytest
from data_fakes import encoded, pixels
from PIL import Image

from drorae.data.decoding import (
    BadImage,
    ImageLimits,
    decode_accepted,
    decode_image,
    decode_png,
    encode_png,
    to_square,
)

LIMITS = ImageLimits(min_side_px=8, max_aspect_ratio=20.0, max_pixels=1_000_000)


def reason(data: bytes | np.ndarray, limits: ImageLimits = LIMITS) -> str:
    with pytest.raises(BadImage) as caught:
        decode_image(data, limits)
    return str(caught.value)


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def test_png_survives_a_round_trip():
    image = decode_image(encoded(pixels(0)), LIMITS)
    np.testing.assert_array_equal(decode_png(encode_png(image)), pixels(0))


def test_raw_pixels_are_accepted_and_size_checked():
    np.testing.assert_array_equal(np.asarray(decode_image(pixels(0), LIMITS)), pixels(0))
    assert "smaller than 8" in reason(pixels(0, width=4))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty file"),
        (b"this is a text file", "not an image"),
        (encoded(pixels(0, 200, 200), "JPEG")[:900], "truncated or damaged"),
        (encoded(pixels(0, 200, 200))[:900], "truncated or damaged"),
        (encoded(pixels(0, 1, 1)), "smaller than 8"),
        (encoded(pixels(0, 2000, 10)), "aspect ratio 20"),
        (bomb(30_000, 30_000), "more than 1000000 pixels"),
        (bomb(3_000, 3_000), "more than 1000000 pixels"),
    ],
)
def test_bad_files_are_refused_with_a_reason(data: bytes, expected: str):
    assert expected in reason(data)


def test_reason_of_a_damaged_file_is_the_same_on_each_read():
    assert reason(b"no image") == reason(b"no image")


def test_animated_gif_is_refused_with_its_number_of_frames():
    frames = [Image.fromarray(pixels(i)) for i in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert reason(data) == "animated or multi-page: 3 frames"


def test_gif_with_one_frame_is_accepted():
    assert decode_image(encoded(Image.fromarray(pixels(0)), "GIF"), LIMITS).mode == "RGB"


def test_transparency_lies_on_white():
    clear = Image.new("RGBA", (9, 9), (0, 0, 0, 0))
    assert np.asarray(decode_image(encoded(clear), LIMITS)).min() == 255


def test_palette_transparency_lies_on_white():
    image = Image.new("P", (9, 9), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert np.asarray(decode_image(encoded(image, transparency=0), LIMITS)).min() == 255


def test_memory_error_is_a_reason(monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    assert "memory" in reason(encoded(pixels(0)))


def test_centre_crop_takes_the_middle_without_scaling_when_the_size_fits():
    image = Image.fromarray(pixels(0, 20, 16))
    cropped = np.asarray(to_square(image, 16, "center"))
    np.testing.assert_array_equal(cropped, pixels(0, 20, 16)[:, 2:18])


def test_centre_crop_halves_with_a_box_filter_first():
    image = Image.fromarray(pixels(1, 32, 32))
    blocks = pixels(1, 32, 32).reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    cropped = np.asarray(to_square(image, 16, "center")).astype(float)
    assert np.abs(cropped - blocks).max() <= 1  # Pillow rounds after each axis


def test_resize_keeps_the_whole_picture():
    image = Image.new("RGB", (40, 20), "red")
    assert to_square(image, 16, "resize").size == (16, 16)


def test_small_images_are_enlarged():
    assert to_square(Image.fromarray(pixels(0, 9, 12)), 16, "center").size == (16, 16)


def test_multi_picture_jpeg_of_a_phone_is_accepted():
    frames = [Image.fromarray(pixels(i)) for i in range(2)]
    buffer = io.BytesIO()
    frames[0].save(buffer, format="MPO", save_all=True, append_images=frames[1:])
    assert decode_image(buffer.getvalue(), LIMITS).size == (20, 18)


LARGE = ImageLimits(min_side_px=8, max_aspect_ratio=20.0, max_pixels=400_000_000)


def test_only_the_limits_that_are_given_forbid_a_large_picture():
    # Above 179 million pixels the decoder refuses by itself; here only the missing rows are.
    assert "truncated" in reason(bomb(14_000, 13_000), LARGE)
    with pytest.raises(BadImage, match="truncated"):
        decode_accepted(bomb(14_000, 13_000))
    assert "20001x20000 is more than 400000000 pixels" in reason(bomb(20_001, 20_000), LARGE)


def test_an_icon_and_a_webp_are_refused_before_they_are_opened():
    inner = bomb(30_000, 30_000)
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 32, 32, 0, 0, 1, 32, len(inner), 22) + inner
    assert reason(icon) == "30000x30000 is more than 1000000 pixels"
    webp = bytearray(encoded(Image.new("RGBA", (20, 20), (1, 2, 3, 4)), "WEBP", exif=b"x"))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = b"\xff\xff\x00\xff\xff\x00"
    assert reason(bytes(webp)) == "65536x65536 is more than 1000000 pixels"


def test_a_jpeg_of_thousands_of_scans_is_refused():
    data = encoded(pixels(0), "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    many = data[:scan] + data[scan:-2] * 500 + data[-2:]
    assert "scans, more than 200" in reason(many)
