"""A contact sheet: squares as shards hold them, each with label and key, classes side by side.

For looking at: are these pictures of these classes? Rejected images stand at the end with the
reason. Small squares are enlarged by whole factors, so that what is seen is what would be trained
on.
"""

import colorsys
import functools
import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from drorae.data.inspected_sample import SampledImage

__all__ = ["MAX_PICTURES", "TILE_PX", "contact_sheet"]

MAX_PICTURES = 48
"""Pictures on a sheet."""

TILE_PX = 142
"""Side of a picture on the sheet."""

COLUMNS = 8
GAP_PX, MARGIN_PX = 8, 4
BAR_PX, CAPTION_PX, HEAD_PX = 4, 34, 34
PAPER, INK, PALE, EMPTY, ALARM = "#ffffff", "#202020", "#767676", "#ececec", "#b3261e"
NAME_PX, KEY_PX, TITLE_PX = 12, 10, 15
HUE_STEP = 0.618034
"""Golden ratio: neighbouring labels get colours that are far apart."""

UNDRAWN = "\uffff"
"""Code point that no font has."""


def contact_sheet(images: Sequence[SampledImage], class_names: Sequence[str], title: str) -> bytes:
    """Draw up to `MAX_PICTURES` images, 1,200 px wide.

    Args:
        images: A sample, best spread first.
        class_names: Classes in label order.
        title: Text above the pictures.

    Returns:
        A PNG file.
    """
    shown = sorted(images[:MAX_PICTURES], key=_place)
    rows = max(1, -(-len(shown) // COLUMNS))
    step_x, step_y = TILE_PX + GAP_PX, BAR_PX + TILE_PX + CAPTION_PX + GAP_PX
    size = (2 * MARGIN_PX + COLUMNS * step_x - GAP_PX, HEAD_PX + rows * step_y)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    width = size[0] - 2 * MARGIN_PX
    draw.text((MARGIN_PX, 7), _fitted(title, TITLE_PX, width), fill=INK, font=_font(TITLE_PX))
    for number, image in enumerate(shown):
        row, column = divmod(number, COLUMNS)
        corner = (MARGIN_PX + column * step_x, HEAD_PX + row * step_y)
        _draw_tile(sheet, draw, corner, image, class_names)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _place(image: SampledImage) -> tuple[bool, bool, int, str, str]:
    return bool(image.reason), image.label < 0, image.label, image.split, image.key


def _draw_tile(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    image: SampledImage,
    class_names: Sequence[str],
) -> None:
    left, top = corner
    colour = ALARM if image.reason else _colour(image.label)
    draw.rectangle((left, top, left + TILE_PX - 1, top + BAR_PX - 1), fill=colour)
    box = (left, top + BAR_PX, left + TILE_PX - 1, top + BAR_PX + TILE_PX - 1)
    if image.square is None:
        draw.rectangle(box, fill=EMPTY)
        _draw_reason(draw, (left + 6, top + BAR_PX + 6), image.reason)
    else:
        tile = _tile(image.square)
        inset = (TILE_PX - tile.width) // 2
        if inset:
            draw.rectangle(box, fill=EMPTY)
        sheet.paste(tile, (left + inset, top + BAR_PX + inset))
    text = top + BAR_PX + TILE_PX + 2
    mark = " (val)" if image.split == "val" else ""
    label = f"{image.label} {class_names[image.label]}" if image.label >= 0 else "no label"
    name = _fitted(label, NAME_PX, TILE_PX - _width(mark, KEY_PX))
    draw.text((left, text), name, fill=INK, font=_font(NAME_PX))
    draw.text((left + _width(name, NAME_PX), text + 2), mark, fill=PALE, font=_font(KEY_PX))
    key = _fitted(image.key, KEY_PX, TILE_PX, keeps_end=True)
    draw.text((left, text + 16), key, fill=PALE, font=_font(KEY_PX))


def _draw_reason(draw: ImageDraw.ImageDraw, corner: tuple[int, int], reason: str) -> None:
    lines, line = [], ""
    for word in _drawable(f"rejected: {reason}").split():
        longer = f"{line} {word}".strip()
        if line and _width(longer, NAME_PX) > TILE_PX - 12:
            lines.append(line)
            longer = word
        line = longer
    for number, text in enumerate([*lines, line][:8]):
        place = (corner[0], corner[1] + 16 * number)
        draw.text(place, _fitted(text, NAME_PX, TILE_PX - 12), fill=ALARM, font=_font(NAME_PX))


def _tile(square: Image.Image) -> Image.Image:
    factor = TILE_PX // square.width
    if factor:
        side = square.width * factor
        return square.resize((side, side), Image.Resampling.NEAREST)
    return square.resize((TILE_PX, TILE_PX), Image.Resampling.BOX)


def _colour(label: int) -> tuple[int, int, int] | str:
    if label < 0:
        return PALE
    red, green, blue = colorsys.hsv_to_rgb(label * HUE_STEP % 1.0, 0.62, 0.82)
    return round(255 * red), round(255 * green), round(255 * blue)


def _fitted(text: str, size_px: int, width: float, *, keeps_end: bool = False) -> str:
    """A text as the font can draw it, cut to a width with a mark where something is missing."""
    text = _drawable(text)
    if _width(text, size_px) <= width:
        return text
    low, high = 0, len(text)
    while low < high:  # most characters that fit
        middle = (low + high + 1) // 2
        fits = _width(_cut(text, middle, keeps_end), size_px) <= width
        low, high = (middle, high) if fits else (low, middle - 1)
    return _cut(text, low, keeps_end)


def _cut(text: str, length: int, keeps_end: bool) -> str:
    return f"...{text[len(text) - length :]}" if keeps_end else f"{text[:length]}..."


def _drawable(text: str) -> str:
    return "".join(character if _is_drawable(character) else "?" for character in text)


@functools.cache
def _is_drawable(character: str) -> bool:
    """Whether the font has a picture of a character: no surrogate, no control, no empty box."""
    if not character.isprintable():
        return False
    return character == " " or _shape(character) != _shape(UNDRAWN)


def _shape(character: str) -> bytes:
    picture = Image.new("L", (2 * NAME_PX, 2 * NAME_PX))
    ImageDraw.Draw(picture).text((2, 2), character, fill=255, font=_font(NAME_PX))
    return picture.tobytes()


def _width(text: str, size_px: int) -> float:
    return _font(size_px).getlength(text)


@functools.cache
def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Matplotlib's font, which has Latin, Greek and Cyrillic; Pillow's own has ASCII."""
    package = find_spec("matplotlib")
    folder = Path(package.origin).parent if package and package.origin else Path()
    try:
        return ImageFont.truetype(folder / "mpl-data/fonts/ttf/DejaVuSans.ttf", size_px)
    except OSError:
        return ImageFont.load_default(size=size_px)
