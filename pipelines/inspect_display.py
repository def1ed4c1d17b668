"""An inspection as text for a terminal of 80 columns or more."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from drorae.data.jobs import ShardJob

if TYPE_CHECKING:
    from drorae.data.inspected_sample import Sample, Spread
    from drorae.data.inspection import Inspection, Place

FIRST_CLASSES, LAST_CLASSES = 6, 3
"""Classes that are shown of many."""

PLACES = {
    "file": ("image folder", "image folders"),
    "tar": ("tar archive", "tar archives"),
    "zip": ("zip archive", "zip archives"),
    "parquet": ("Parquet file", "Parquet files"),
    "cifar": ("sheet of pixels", "sheets of pixels"),
}
"""One and several containers of each kind."""


def print_inspection(found: "Inspection", job: ShardJob, console: Console) -> None:
    """Print what would be read.

    Args:
        found: The inspection.
        job: Its job.
        console: Where to print.
    """
    _print_source(found, console)
    _print_notes(found, console)
    _print_splits(found, console)
    _print_classes(found, console)
    _print_sample(found.sample, job, console)
    _print_rejects(found, console)


def print_problems(recipe: str, problems: Sequence[str], console: Console) -> None:
    """Print whether a source fits a recipe.

    Args:
        recipe: Name of the recipe.
        problems: What does not fit.
        console: Where to print.
    """
    fits = "the classes and the validation images fit" if not problems else "does not fit"
    _head(console, f"recipe {recipe}: {fits}")
    _print_marked([(problem, True) for problem in problems], console)


def _print_source(found: "Inspection", console: Console) -> None:
    grid = _grid()
    grid.add_row("source", _text(found.source))
    if found.val_source is not None:
        grid.add_row("val_source", _text(found.val_source))
    about = "about " if found.is_size_estimated else ""
    size = "" if found.size_bytes is None else f", {about}{_bytes(found.size_bytes)}"
    grid.add_row("images", f"{found.images:,}{size}")
    grid.add_row("in", ", ".join(_place(place) for place in found.places))
    grid.add_row("classes", f"{len(found.class_names):,}")
    console.print(grid)


def _place(place: "Place") -> str:
    names = PLACES[place.kind]
    images = f"{place.images:,} image{'s' if place.images != 1 else ''}"
    return f"{place.containers:,} {names[place.containers != 1]} ({images})"


def _print_notes(found: "Inspection", console: Console) -> None:
    doubtful = sum(note.is_doubtful for note in found.notes)
    if found.notes:
        _head(console, f"decided by the readers: {len(found.notes)}, doubtful (!): {doubtful}")
        _print_marked([(note.text, note.is_doubtful) for note in found.notes], console)


def _print_marked(texts: Sequence[tuple[str, bool]], console: Console) -> None:
    """Texts one below the other, with a mark where one asks for attention."""
    grid = _grid(1)
    for text, is_marked in texts:
        grid.add_row("!" if is_marked else " ", _text(text))
    if texts:
        console.print(grid)


def _print_splits(found: "Inspection", console: Console) -> None:
    _head(console, f"splits, made by {found.split_by}")
    columns = {"images": [f"{split.images:,}" for split in found.splits]}
    if any(split.kept < split.images for split in found.splits):
        columns["kept"] = [f"{split.kept:,}" for split in found.splits]
    if any(split.unlabelled for split in found.splits):
        columns["unlabelled"] = [f"{split.unlabelled:,}" for split in found.splits]
    table = Table("split", box=None, pad_edge=False)
    for name in (*columns, "classes"):
        table.add_column(name, justify="right")
    table.add_column("images of a class")
    for place, split in enumerate(found.splits):
        cells = [values[place] for values in columns.values()]
        spread = _spread(split.spread) if split.spread else "-"
        table.add_row(split.name, *cells, f"{split.classes:,}", spread)
    console.print(table)
    _print_marked([(problem, True) for problem in found.problems], console)


def _print_classes(found: "Inspection", console: Console) -> None:
    _head(console, "classes in label order, images of each")
    table = Table(box=None, pad_edge=False)
    table.add_column("label", justify="right")
    table.add_column("class", max_width=48, overflow="ellipsis", no_wrap=True)
    for split in found.splits:
        table.add_column(split.name, justify="right")
    count = len(found.class_names)
    for label in _some(count):
        if label is None:
            more = count - FIRST_CLASSES - LAST_CLASSES
            table.add_row("...", f"{more:,} more (all with --json)")
            continue
        rows = (f"{split.class_rows[label]:,}" for split in found.splits)
        table.add_row(str(label), _text(found.class_names[label]), *rows)
    console.print(table)


def _some(count: int) -> Iterable[int | None]:
    """Labels to show, None where some are left out."""
    if count <= FIRST_CLASSES + LAST_CLASSES + 1:
        return range(count)
    return [*range(FIRST_CLASSES), None, *range(count - LAST_CLASSES, count)]


def _print_sample(sample: "Sample", job: ShardJob, console: Console) -> None:
    _head(console, f"{sample.images} images, chosen by hash and decoded as stage shard does")
    grid = _grid()
    grid.add_row("formats", _counts(sample.formats))
    converted = {mode: count for mode, count in sample.modes.items() if mode != "RGB"}
    also = f"; converted to RGB: {_counts(converted)}" if converted else ""
    grid.add_row("modes", f"RGB {sample.modes.get('RGB', 0)}{also}")
    if sample.width_px and sample.height_px:
        grid.add_row("width px", _spread(sample.width_px))
        grid.add_row("height px", _spread(sample.height_px))
    grid.add_row("turned", f"{sample.turned} by their Exif orientation")
    grid.add_row(
        "upscaled", f"{sample.upscaled} with a side below shard.resolution_px={job.resolution_px}"
    )
    grid.add_row("rejected", str(len(sample.rejects)))
    console.print(grid)
    _print_pairs(sample.rejects, console)


def _print_rejects(found: "Inspection", console: Console) -> None:
    if not found.num_rejects:
        return
    _head(console, f"entries that cannot be listed: {found.num_rejects:,}")
    grid = _grid()
    for reason, count in found.reject_reasons.items():
        grid.add_row(f"{count:,} x", _text(reason))
    console.print(grid)
    _say(console, "the first:")
    _print_pairs(found.first_rejects, console)


def _print_pairs(pairs: Sequence[tuple[str, str]], console: Console) -> None:
    grid = _grid(2)
    for key, reason in pairs:
        grid.add_row("", _text(f"{key}: {reason}"))
    console.print(grid, end="")


def _grid(gap: int = 2) -> Table:
    grid = Table.grid(padding=(0, gap, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "-"


def _spread(spread: "Spread") -> str:
    if spread.min == spread.max:
        return f"{spread.min:,}"
    return f"{spread.min:,} to {spread.max:,}, median {spread.median:,g}"


def _bytes(count: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _text(text: str) -> Text:
    """Text of a source, with what a terminal would obey or cannot show as escapes."""
    return Text("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


def _head(console: Console, text: str) -> None:
    console.print()
    _say(console, text)


def _say(console: Console, text: str) -> None:
    console.print(_text(text), highlight=False)
