"""Image grids with labels: uint8 HWC arrays for the tracker and PNG bytes for files.

Small pictures are enlarged by whole factors with nearest neighbour, so that what is seen is what
was measured.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["image_grid", "png_bytes", "to_hwc"]

LABEL_HEIGHT_PX = 16
GAP_PX = 2
INK = (40, 40, 40)
PAPER = (255, 255, 255)
MIN_TILE_PX = 64
MAX_LABEL_CHARACTERS = 40
LAST_DRAWN = "\u024f"
"""Last letter (Latin Extended-B) that the built-in font may have; others would all be one box."""


def to_hwc(images: np.ndarray) -> np.ndarray:
    """[N, 3, H, W] to [N, H, W, 3].

    Raises:
        ValueError: If the array is not uint8 with 3 channels.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"grid got {images.dtype} {images.shape}: expected uint8 [N, 3, H, W]; truncate with "
            "to_uint8 first."
        )
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


def image_grid(
    rows: Sequence[np.ndarray],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> np.ndarray:
    """Lay out rows of equally sized pictures on white, with labels to the left and above.

    Args:
        rows: One uint8 array [N, H, W, 3] per row; rows may differ in N.
        row_labels: One text per row, or none; a long one is cut.
        column_labels: One text per column, or none.

    Returns:
        One uint8 picture [height, width, 3].

    Raises:
        ValueError: If there is no picture, or the number of row labels differs from the number of
        rows.
    """
    if not rows or not any(len(r) for r in rows):
        raise ValueError("image grid got no pictures: expected at least one row with one picture.")
    if row_labels and len(row_labels) != len(rows):
        raise ValueError(
            f"image grid got {len(row_labels)} row labels for {len(rows)} rows: expected one each "
            "or none."
        )
    row_labels, column_labels = ([*map(_drawn, t)] for t in (row_labels, column_labels))
    height, width = next(r for r in rows if len(r)).shape[1:3]
    factor = max(1, -(-MIN_TILE_PX // min(height, width)))
    tile_h, tile_w = height * factor, width * factor
    left = _label_width(row_labels)
    top = LABEL_HEIGHT_PX if column_labels else 0
    columns = max(len(r) for r in rows)
    canvas = Image.new(
        "RGB",
        (left + columns * (tile_w + GAP_PX) - GAP_PX, top + len(rows) * (tile_h + GAP_PX) - GAP_PX),
        PAPER,
    )
    draw = ImageDraw.Draw(canvas)
    for i, row in enumerate(rows):
        y = top + i * (tile_h + GAP_PX)
        if row_labels:
            draw.text((2, y + tile_h // 2 - 6), row_labels[i], fill=INK, font=_font())
        for j, tile in enumerate(row):
            picture = Image.fromarray(tile).resize((tile_w, tile_h), Image.Resampling.NEAREST)
            canvas.paste(picture, (left + j * (tile_w + GAP_PX), y))
    for j, text in enumerate(column_labels[:columns]):
        draw.text((left + j * (tile_w + GAP_PX) + 2, 2), text, fill=INK, font=_font())
    return np.asarray(canvas)


def png_bytes(picture: np.ndarray) -> bytes:
    """PNG file of one uint8 HWC picture."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _drawn(text: str) -> str:
    """A label in one line of letters that the font has, cut to what fits beside a picture."""
    line = "".join(c if c <= LAST_DRAWN else "?" for c in " ".join(text.split()))
    printable = "".join(c if c.isprintable() else "?" for c in line)
    cut = printable[: MAX_LABEL_CHARACTERS - 3] + "..."
    return printable if len(printable) <= MAX_LABEL_CHARACTERS else cut


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=11)


def _label_width(labels: Sequence[str]) -> int:
    if not labels:
        return 0
    return 8 + int(max(_font().getlength(text) for text in labels))
