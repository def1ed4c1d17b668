import struct
import zlib

import numpy as np
import pytest
from data_fakes import encoded, pixels
from picture_files import chunk, exif, png, tiff, with_chunks, with_segments
from PIL import Image

from drorae.data.decoding import BadImage, ImageLimits, decode_accepted, decode_image

LIMITS = ImageLimits(min_side_px=8, max_aspect_ratio=20.0, max_pixels=1_000_000)
PNG = encoded(pixels(0))
JPEG = encoded(pixels(0), "JPEG")
WEBP = encoded(pixels(0), "WEBP", lossless=True)
PACKED_3_MB = zlib.compress(b"A" * 3_000_000)

TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}
"""The picture as it is meant, by its orientation (EXIF 2.32, tag 274)."""


def decoded(data: bytes) -> np.ndarray:
    """Pixels, which both ways of decoding have to agree on."""
    image = np.asarray(decode_image(data, LIMITS))
    np.testing.assert_array_equal(np.asarray(decode_accepted(data)), image)
    return image


PNG_METADATA = {
    "impossible rational": chunk(b"eXIf", exif()),
    "no EXIF at all": chunk(b"eXIf", b"nonsense"),
    "text of 3 MB": chunk(b"zTXt", b"comment\0\0" + PACKED_3_MB),
    "international text of 3 MB": chunk(b"iTXt", b"comment\0\1\0\0\0" + PACKED_3_MB),
    "text in an unknown compression": chunk(b"zTXt", b"comment\0\7abc"),
    "profile of 3 MB": chunk(b"iCCP", b"name\0\0" + PACKED_3_MB),
    "profile in an unknown compression": chunk(b"iCCP", b"name\0\7abc"),
    "profile without an end": chunk(b"iCCP", b"name"),
    "cut off gamma": chunk(b"gAMA", b"\0"),
    "cut off size in metres": chunk(b"pHYs", b"\0"),
    "broken checksum": chunk(b"tIME", b"1234567")[:-1] + b"?",
    "EXIF in hexadecimal text": chunk(b"tEXt", b"Raw profile type exif\0\n\n\nxyz"),
}


@pytest.mark.parametrize("name", PNG_METADATA)
def test_damaged_metadata_of_a_png_costs_no_pixel(name: str):
    np.testing.assert_array_equal(decoded(with_chunks(PNG, PNG_METADATA[name])), pixels(0))


@pytest.mark.parametrize("tail", [chunk(b"zTXt", b"a\0\0" + PACKED_3_MB), b"\0\0\xff\xfftEXtcut"])
def test_damage_after_the_pixels_of_a_png_costs_none(tail: bytes):
    np.testing.assert_array_equal(decoded(PNG[:-12] + tail + PNG[-12:]), pixels(0))


JPEG_METADATA = {
    "impossible rational": (0xE1, b"Exif\0\0" + exif()),
    "no EXIF at all": (0xE1, b"Exif\0\0nonsense"),
    "cut off EXIF": (0xE1, b"Exif\0\0" + exif()[:13]),
    "cut off JFIF": (0xE0, b"JFIF\0\1"),
    "cut off Adobe": (0xEE, b"Adobe"),
    "cut off profile": (0xE2, b"ICC_PROFILE\0"),
    "cut off Photoshop block": (0xED, b"Photoshop 3.0\x008BIM\0\1"),
    "cut off list of pictures": (0xE2, b"MPF\0II*\0"),
    "comment": (0xFE, b"\xff\xd9\xff\xda"),
}


@pytest.mark.parametrize("name", JPEG_METADATA)
def test_damaged_metadata_of_a_jpeg_costs_no_pixel(name: str):
    np.testing.assert_array_equal(decoded(with_segments(JPEG, JPEG_METADATA[name])), decoded(JPEG))


def test_impossible_resolution_of_a_tiff_costs_no_pixel():
    good = tiff("<", (20, 18), pixels(0).tobytes(), photometric=2, channels=3)
    bad = tiff("<", (20, 18), pixels(0).tobytes(), (282, 10, (-1, 0)), photometric=2, channels=3)
    np.testing.assert_array_equal(decoded(bad), decoded(good))


def test_damaged_exif_of_a_webp_costs_no_pixel():
    data = encoded(pixels(0), "WEBP", lossless=True, exif=exif())
    np.testing.assert_array_equal(decoded(data), pixels(0))
    np.testing.assert_array_equal(decoded(data[:-9]), pixels(0))


def test_damaged_exif_of_an_avif_costs_no_pixel():
    plain = encoded(pixels(0), "AVIF")
    described = Image.Exif()
    described[0x010E] = "a description"
    whole = encoded(pixels(0), "AVIF", exif=described)
    damaged = whole.replace(described.tobytes()[6:14], b"nonsense")
    assert damaged != whole
    np.testing.assert_array_equal(decoded(damaged), decoded(plain))


@pytest.mark.parametrize("number", TURNED)
@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_turns_the_picture_in_every_format(number: int, order: str):
    block, turn = exif(number, order), TURNED[number]
    upright = turn(pixels(0))
    np.testing.assert_array_equal(decoded(with_chunks(PNG, chunk(b"eXIf", block))), upright)
    jpeg = with_segments(JPEG, (0xE1, b"Exif\0\0" + block))
    np.testing.assert_array_equal(decoded(jpeg), turn(decoded(JPEG)))
    webp = encoded(pixels(0), "WEBP", lossless=True, exif=block)
    np.testing.assert_array_equal(decoded(webp), upright)
    flat = pixels(0).tobytes()
    page = tiff(order, (20, 18), flat, (274, 3, (number,)), photometric=2, channels=3)
    np.testing.assert_array_equal(decoded(page), upright)


@pytest.mark.parametrize("number", TURNED)
def test_orientation_of_an_avif_is_that_of_its_boxes(number: int):
    turned = Image.Exif()
    turned[0x0112] = number
    data = encoded(pixels(0), "AVIF", exif=turned)
    np.testing.assert_array_equal(
        decoded(data), TURNED[number](decoded(encoded(pixels(0), "AVIF")))
    )


@pytest.mark.parametrize("number", [0, 9, 255])
def test_an_orientation_that_does_not_exist_turns_nothing(number: int):
    data = with_chunks(PNG, chunk(b"eXIf", exif(number)))
    np.testing.assert_array_equal(decoded(data), pixels(0))


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize(
    "data",
    [
        with_chunks(PNG, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
        with_chunks(PNG, chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP))),
        encoded(pixels(0), "WEBP", lossless=True, xmp=XMP),
        tiff("<", (20, 18), pixels(0).tobytes(), (700, 1, tuple(XMP)), photometric=2, channels=3),
        with_chunks(
            PNG,
            chunk(b"tEXt", b"Raw profile type exif\0\nexif\n64\n" + exif(6).hex().encode() + b"\n"),
        ),
    ],
)
def test_orientation_may_stand_in_xmp_or_in_text(data: bytes):
    np.testing.assert_array_equal(decoded(data), np.rot90(pixels(0), -1))


def test_orientation_may_stand_in_the_xmp_of_a_jpeg():
    data = with_segments(JPEG, (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP))
    np.testing.assert_array_equal(decoded(data), np.rot90(decoded(JPEG), -1))


def test_frames_of_animations_are_counted():
    frames = [Image.fromarray(pixels(i)) for i in range(3)]
    for name in ("GIF", "PNG", "WEBP", "AVIF", "TIFF"):
        data = encoded(frames[0], name, save_all=True, append_images=frames[1:])
        with pytest.raises(BadImage, match="animated or multi-page: 3 frames"):
            decode_image(data, LIMITS)


def test_an_animation_of_one_frame_is_a_picture():
    rows = b"".join(b"\0" + bytes(20) for _ in range(18))
    control = struct.pack(">IIIIIHHBB", 0, 20, 18, 0, 0, 1, 1, 0, 0)
    one = [chunk(b"acTL", struct.pack(">II", 1, 0)), chunk(b"fcTL", control)]
    assert decoded(png((20, 18), rows, *one)).shape == (18, 20, 3)
    with pytest.raises(BadImage, match="2 frames"):
        decode_image(png((20, 18), rows, one[0], after=one[1]), LIMITS)


def test_frames_without_end_are_not_counted_to_the_end():
    frame = b"\x2c" + bytes(8) + b"\0\2\0"
    with pytest.raises(BadImage, match="1000 frames"):
        decode_image(b"GIF89a\x14\0\x12\0\0\0\0" + frame * 1_000_000, LIMITS)


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG", "JPEG"])
def test_bytes_behind_a_picture_do_not_matter(name: str):
    data = encoded(pixels(0), name)
    for junk in (b"\0," * 40, b"<!-- appended by a web server -->"):
        np.testing.assert_array_equal(decoded(data + junk), decoded(data))


def test_long_junk_between_the_segments_of_a_jpeg_costs_no_time():
    padded = JPEG[:2] + b"\xff" * 50_000_000 + JPEG[2:]
    np.testing.assert_array_equal(decoded(padded), decoded(JPEG))


def test_pages_that_refer_to_each_other_end():
    data = bytearray(tiff("<", (20, 18), bytes(360)))
    (count,) = struct.unpack_from("<H", data, 8)
    struct.pack_into("<I", data, 10 + 12 * count, 8)
    assert decoded(bytes(data)).shape == (18, 20, 3)
