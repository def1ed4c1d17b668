"""Folders, tables and pictures as people have them, with what each must give."""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import source_fakes as fakes

UNLABELLED = None
"""Class of a row with the label -1."""

Rows = dict[str, tuple[str | None, int | np.ndarray]]
"""Key to class and number of the picture, or its pixels."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the stage `shard` must make of a source."""

    class_names: tuple[str, ...] = ()
    """In label order."""
    train: Rows = field(default_factory=dict)
    val: Rows = field(default_factory=dict)
    rejects: dict[str, str] = field(default_factory=dict)
    """Key to part of the reason."""
    error: str = ""
    """Pattern of the one error; the rest does not matter."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the shard job, beside `source`."""
    source: str = ""
    """Path below the folder; empty: what was made."""


Cases = dict[str, Callable[[Path], Wanted]]
"""Name to what writes a source into an empty folder."""

FOLDERS: Cases = {}


def case(cases: Cases) -> Callable[[Callable[[Path], Wanted]], Callable[[Path], Wanted]]:
    """Decorator that adds a case."""

    def add(make: Callable[[Path], Wanted]) -> Callable[[Path], Wanted]:
        cases[make.__name__] = make
        return make

    return add


def numbered(names: dict[str, str | None], first: int = 0) -> Rows:
    """Rows whose pictures are numbered in this order."""
    return {key: (name, number) for number, (key, name) in enumerate(names.items(), first)}


@case(FOLDERS)
def flat_validation_beside_class_folders(root: Path) -> Wanted:
    train = ["n014/0.png", "n014/1.png", "n015/2.png", "n015/3.png"]
    fakes.folder(root / "train", train)
    fakes.folder(root / "val", ["val_0.png", "val_1.png"], first=4)
    return Wanted(
        source="train",
        settings={"val_source": str(root / "val")},
        class_names=("n014", "n015"),
        train=numbered({f"train/{name}": name[:4] for name in train}),
        val=numbered({"val/val_0.png": UNLABELLED, "val/val_1.png": UNLABELLED}, 4),
    )


@case(FOLDERS)
def flat_validation_with_its_label_file(root: Path) -> Wanted:
    wanted = flat_validation_beside_class_folders(root)
    solution = root / "LOC_val_solution.csv"
    solution.write_text("ImageId,PredictionString\nval_0,n015 1 2 3 4\nval_1,n014 5 6 7 8\n")
    val = numbered({"val/val_0.png": "n015", "val/val_1.png": "n014"}, 4)
    settings = wanted.settings | {"val_label_file": str(solution)}
    return replace(wanted, val=val, settings=settings)


@case(FOLDERS)
def validation_with_a_class_that_training_does_not_know(root: Path) -> Wanted:
    fakes.folder(root / "train", ["cat/0.png", "dog/1.png"])
    fakes.folder(root / "val", ["ape/2.png", "cat/3.png"])
    settings = {"val_source": str(root / "val")}
    return Wanted(source="train", settings=settings, error=r"ape")


@case(FOLDERS)
def table_beside_a_few_pictures(root: Path) -> Wanted:
    fakes.folder(root, ["assets/banner.png", "assets/logo.png"], first=90)
    names = ["tench", "goldfish", "shark"]
    labels = [0, 1, 2, 0, 1, 2]
    path = root / "data" / "train-00000.parquet"
    fakes.parquet(path, {"label": labels}, metadata=fakes.class_label(names))
    return Wanted(
        class_names=tuple(names),
        train=numbered({f"data/{path.name}/{i:08d}": names[n] for i, n in enumerate(labels)}),
        rejects={"assets/banner.png": "", "assets/logo.png": ""},
    )


@case(FOLDERS)
def folders_named_train_and_val(root: Path) -> Wanted:
    train = [f"train/{name}/{i}.png" for name in ("n014", "n015") for i in range(4)]
    val = [f"val/{name}/{i}.png" for name in ("n014", "n015") for i in range(2)]
    fakes.folder(root, train)
    fakes.folder(root, val, first=8)
    return Wanted(
        class_names=("n014", "n015"),
        train=numbered({key: key.split("/")[1] for key in train}),
        val=numbered({key: key.split("/")[1] for key in val}, 8),
    )


@case(FOLDERS)
def labels_of_minus_one_as_in_test_splits_of_the_hub(root: Path) -> Wanted:
    names = ["tench", "goldfish", "shark"]
    metadata = fakes.class_label(names)
    labels = [0, 1, 2, 0]
    fakes.parquet(root / "data/train-0.parquet", {"label": labels}, metadata=metadata)
    fakes.parquet(root / "data/test-0.parquet", {"label": [-1, -1]}, first=4, metadata=metadata)
    rows = {f"data/train-0.parquet/{i:08d}": names[n] for i, n in enumerate(labels)}
    rejects = {f"data/test-0.parquet/{i:08d}": "" for i in range(2)}
    return Wanted(class_names=tuple(names), train=numbered(rows), rejects=rejects)


@case(FOLDERS)
def two_shards_with_other_lists_of_names(root: Path) -> Wanted:
    for number, names in enumerate((["cat", "dog"], ["bird", "cat"])):
        metadata = fakes.class_label(names)
        path = root / f"{number}.parquet"
        fakes.parquet(path, {"label": [0, 1]}, first=2 * number, metadata=metadata)
    keys = [f"{number}.parquet/{row:08d}" for number in range(2) for row in range(2)]
    rows = dict(zip(keys, ("cat", "dog", "bird", "cat"), strict=True))
    return Wanted(class_names=("bird", "cat", "dog"), train=numbered(rows))


@case(FOLDERS)
def metadata_whose_features_are_null(root: Path) -> Wanted:
    path = root / "a.parquet"
    fakes.parquet(path, {"label": [0, 1, 0]}, metadata={"info": {"features": None}})
    rows = {f"a.parquet/{row:08d}": name for row, name in enumerate("010")}
    return Wanted(source=path.name, class_names=("0", "1"), train=numbered(rows))


@case(FOLDERS)
def second_row_group_damaged(root: Path) -> Wanted:
    path = root / "a.parquet"
    fakes.parquet(path, {"label": [0, 1] * 4}, row_group_size=4, compression="NONE")
    fakes.damage_row_group(path, 1)
    rows = numbered({f"a.parquet/{row:08d}": str(row % 2) for row in range(4)})
    rejects = {f"a.parquet/{row:08d}": "cannot be read" for row in range(4, 8)}
    return Wanted(source="a.parquet", class_names=("0", "1"), train=rows, rejects=rejects)


@case(FOLDERS)
def folder_that_is_named_as_a_table(root: Path) -> Wanted:
    fakes.parquet(root / "images.parquet/part-0.snappy.parquet", {"label": [0, 1, 0, 1]})
    (root / "images.parquet/_SUCCESS").touch()
    rows = numbered({f"part-0.snappy.parquet/{row:08d}": str(row % 2) for row in range(4)})
    return Wanted(source="images.parquet", class_names=("0", "1"), train=rows)


@case(FOLDERS)
def no_label_column_but_others(root: Path) -> Wanted:
    columns = {"fine_label": [0, 1, 0], "coarse_label": [0, 0, 1]}
    fakes.parquet(root / "a.parquet", columns)
    return Wanted(source="a.parquet", error=r"(?s)fine_label.*coarse_label")


@case(FOLDERS)
def labels_that_are_floats(root: Path) -> Wanted:
    fakes.parquet(root / "a.parquet", {"label": [float(number) for number in range(12)]})
    rows = numbered({f"a.parquet/{row:08d}": str(row) for row in range(12)})
    names = tuple(str(number) for number in range(12))
    return Wanted(source="a.parquet", class_names=names, train=rows)


@case(FOLDERS)
def unusual_formats(root: Path) -> Wanted:
    formats = {"a.pgm": "PPM", "b.tga": "TGA", "c.jp2": "JPEG2000", "d.bmp": "BMP", "e.gif": "GIF"}
    formats = {name: kind for name, kind in formats.items() if kind != "GIF"}
    for number, (name, kind) in enumerate(formats.items()):
        options = {"irreversible": False} if kind == "JPEG2000" else {}
        (root / name).write_bytes(fakes.picture(number, kind, **options))
    return Wanted(class_names=("all",), train=numbered(dict.fromkeys(formats, "all")))


@case(FOLDERS)
def names_that_say_nothing(root: Path) -> Wanted:
    """What is inside decides."""
    names = ["ok.png", "named.jpg_large", "noext", "two.jpeg.1", "photo.heic"]
    fakes.folder(root, names)
    (root / "text").write_text("no picture")
    rows = numbered(dict.fromkeys(names, "all"))
    return Wanted(class_names=("all",), train=rows, rejects={"text": "not an image"})


@case(FOLDERS)
def good_pixels_beside_bad_metadata(root: Path) -> Wanted:
    (root / "a").mkdir()
    png = fakes.picture(0)
    # Horizontal resolution, signed: -1/0.
    entry = struct.pack(">HHII", 282, 10, 1, 26)
    exif = b"MM\0*\0\0\0\x08\0\x01" + entry + bytes(4) + struct.pack(">ii", -1, 0)
    large = b"a\0\0" + zlib.compress(bytes(2_000_000))
    chunks = {
        "exif": (b"eXIf", exif[:20]),
        "rational": (b"eXIf", exif),
        "text": (b"zTXt", large),
        "profile": (b"iCCP", large),
    }
    for name, (kind, body) in chunks.items():
        chunk = struct.pack(">I", len(body)) + kind + body
        data = png[:33] + chunk + struct.pack(">I", zlib.crc32(kind + body)) + png[33:]
        (root / "a" / f"{name}.png").write_bytes(data)
    rows: Rows = {f"a/{name}.png": ("a", 0) for name in chunks}
    return Wanted(class_names=("a",), train=rows, settings={"duplicates": "keep"})
