"""CIFAR-10 as PNG sheets: a row of a 1024 x 10000 sheet is one 32 x 32 RGB image, row by row.

The folder is made by `drorae.data.assets` (`asset:cifar10`); the data set's test images are the val
split. Source of the
data: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

import functools
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from drorae.data.readers.candidates import (
    Candidate,
    Listing,
    Record,
    group_by_container,
    joined,
    listed,
)

CLASS_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
"""CIFAR-10 classes in label order."""

SIDE_PX = 32
"""Side of one image."""

SPLITS = {
    "train": ("train_lables.json", tuple(f"data_batch_{i}.png" for i in range(1, 6))),
    "val": ("test_lables.json", ("test_batch.png",)),
}
"""Label file and sheets of each split; the names are those of the package that ships them."""


def list_cifar(folder: str) -> Listing:
    """List all images of the sheets.

    Raises:
        FileNotFoundError: A sheet or label file is missing.
        ValueError: The number of labels does not divide over the sheets.
    """
    tables = []
    for split, (label_file, sheets) in SPLITS.items():
        labels = json.loads((Path(folder) / label_file).read_text())
        rows, rest = divmod(len(labels), len(sheets))
        if rest:
            raise ValueError(
                f"{folder}/{label_file} has {len(labels)} labels: expected a multiple of the "
                f"{len(sheets)} sheets. Fetch the asset again: drorae assets fetch cifar10."
            )
        for start, sheet in zip(range(0, len(labels), rows), sheets, strict=True):
            numbers = range(start, start + rows)
            tables.append(
                listed(
                    "cifar",
                    str(Path(folder) / sheet),
                    keys=[f"{split}/{number:05d}" for number in numbers],
                    class_names=[CLASS_NAMES[labels[number]] for number in numbers],
                    split=split,
                    index=np.arange(rows),
                )
            )
    return Listing(joined(tables), [], CLASS_NAMES)


def read_cifar(candidates: Sequence[Candidate]) -> Iterator[Record]:
    """Cut images out of the sheets; each sheet is decoded once per run of candidates."""
    for container, rows in group_by_container(candidates):
        pixels = read_sheet(container)
        for candidate in rows:
            yield Record(candidate, pixels[candidate.index])


@functools.lru_cache(maxsize=2)
def read_sheet(path: str) -> np.ndarray:
    """Decode one sheet to uint8 [rows, 32, 32, 3], kept (31 MB) because the next chunk needs it."""
    # A sheet has 10 million pixels; Pillow's bomb warning is meant for files from strangers.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path) as sheet:
            return np.asarray(sheet.convert("RGB")).reshape(-1, SIDE_PX, SIDE_PX, 3)
