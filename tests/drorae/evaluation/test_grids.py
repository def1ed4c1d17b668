import io

import numpy as np
import pytest
from PIL import Image

from drorae.evaluation.grids import image_grid, png_bytes, to_hwc


def tiles(count: int, value: int = 0) -> np.ndarray:
    return np.full((count, 32, 32, 3), value, dtype=np.uint8)


def test_small_pictures_are_enlarged_without_blur() -> None:
    picture = image_grid([tiles(3, 200), tiles(2, 10)])
    assert picture.shape == (2 * 66 - 2, 3 * 66 - 2, 3)
    assert (picture[:64, :64] == 200).all()
    assert (picture[66:, 132:] == 255).all()  # the second row is shorter


def test_labels_take_room_to_the_left_and_above() -> None:
    plain = image_grid([tiles(2)])
    labelled = image_grid([tiles(2)], row_labels=["photo"], column_labels=["a", "b"])
    assert labelled.shape[0] == plain.shape[0] + 16
    assert labelled.shape[1] > plain.shape[1]


def test_png_holds_the_same_pixels() -> None:
    picture = image_grid([tiles(1, 7)])
    with Image.open(io.BytesIO(png_bytes(picture))) as image:
        np.testing.assert_array_equal(np.asarray(image), picture)


def test_channels_move_last() -> None:
    assert to_hwc(np.zeros((2, 3, 4, 5), dtype=np.uint8)).shape == (2, 4, 5, 3)
    with pytest.raises(ValueError, match="uint8"):
        to_hwc(np.zeros((2, 3, 4, 5)))


def test_empty_grid_and_wrong_label_count_are_refused() -> None:
    with pytest.raises(ValueError, match="no pictures"):
        image_grid([tiles(0)])
    with pytest.raises(ValueError, match="row labels"):
        image_grid([tiles(1)], row_labels=["a", "b"])


def test_any_name_fits_beside_a_picture() -> None:
    names = ["a" * 500, "\u6f22\u5b57", "two\nlines", "\u00e9t\u00e9", "\ud800", "\x00"]
    picture = image_grid([tiles(1)] * len(names), row_labels=names)
    assert picture.shape[1] < 64 + 500
    drawn = image_grid([tiles(1)] * 2, row_labels=["a" * 37 + "...", "two lines"])
    again = image_grid([tiles(1)] * 2, row_labels=["a" * 41, "two \n lines"])
    np.testing.assert_array_equal(drawn, again)
