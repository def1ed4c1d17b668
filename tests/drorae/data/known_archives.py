"""Tars and zips as people have them, with what each must give."""

import json
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import source_fakes as fakes
from data_fakes import encoded
from known_sources import Cases, Rows, Wanted, case, numbered

ARCHIVES: Cases = {}


@case(ARCHIVES)
def labels_in_dataset_json(root: Path) -> Wanted:
    names = [f"{i // 4:05d}/img{i:08d}.png" for i in range(8)]
    labels = [6, 9, 1, 6, 9, 1, 6, 9]
    members = {name: fakes.picture(number) for number, name in enumerate(names)}
    pairs = json.dumps({"labels": list(zip(names, labels, strict=True))})
    fakes.zipped(root / "set.zip", {**members, "dataset.json": pairs.encode()})
    rows = {f"set.zip/{name}": str(label) for name, label in zip(names, labels, strict=True)}
    return Wanted(source="set.zip", class_names=("1", "6", "9"), train=numbered(rows))


@case(ARCHIVES)
def dots_in_names_of_samples(root: Path) -> Wanted:
    members = [("photo.v1.png", fakes.picture(0)), ("photo.v1.cls", b"0")]
    members += [("photo.v2.png", fakes.picture(1)), ("photo.v2.cls", b"1")]
    fakes.tar(root / "a.tar", members)
    rows = {"a.tar/photo.v1.png": "0", "a.tar/photo.v2.png": "1"}
    return Wanted(source="a.tar", class_names=("0", "1"), train=numbered(rows))


@case(ARCHIVES)
def mask_beside_each_image(root: Path) -> Wanted:
    members = []
    for number in range(3):
        members.append((f"{number}.bmp", fakes.picture(number, "BMP")))
        members.append((f"{number}.mask.png", fakes.picture(50 + number)))
        members.append((f"{number}.cls", str(number % 2).encode()))
    fakes.tar(root / "a.tar", members)
    return Wanted(
        source="a.tar",
        class_names=("0", "1"),
        train=numbered({f"a.tar/{number}.bmp": str(number % 2) for number in range(3)}),
    )


@case(ARCHIVES)
def one_sample_without_a_label(root: Path) -> Wanted:
    members = [(f"train/{number}.png", fakes.picture(number)) for number in range(4)]
    members += [(f"train/{number}.cls", str(number % 2).encode()) for number in range(3)]
    fakes.tar(root / "a.tar", members)
    return Wanted(
        source="a.tar",
        class_names=("0", "1"),
        train=numbered({f"a.tar/train/{number}.png": str(number % 2) for number in range(3)}),
        rejects={"a.tar/train/3.png": "has no label"},
    )


@case(ARCHIVES)
def labels_in_json_that_are_none(root: Path) -> Wanted:
    members = []
    for number, label in enumerate((0, None, 1, [1, 2])):
        members.append((f"{number}.png", fakes.picture(number)))
        members.append((f"{number}.json", json.dumps({"label": label}).encode()))
    fakes.tar(root / "a.tar", members)
    return Wanted(
        source="a.tar",
        class_names=("0", "1"),
        train={"a.tar/0.png": ("0", 0), "a.tar/2.png": ("1", 2)},
        rejects={"a.tar/1.png": "has no label", "a.tar/3.png": "[1, 2]"},
    )


@case(ARCHIVES)
def upper_case_names_and_a_byte_order_mark(root: Path) -> Wanted:
    members = [("0.PNG", fakes.picture(0)), ("0.CLS", b"0\r\n")]
    members += [("1.PNG", fakes.picture(1)), ("1.CLS", b"\xef\xbb\xbf1")]
    fakes.tar(root / "a.tar", members)
    rows = numbered({"a.tar/0.PNG": "0", "a.tar/1.PNG": "1"})
    return Wanted(source="a.tar", class_names=("0", "1"), train=rows)


@case(ARCHIVES)
def member_that_was_replaced(root: Path) -> Wanted:
    names = ["cat/1.png", "cat/2.png", "dog/3.png", "cat/1.png"]
    fakes.tar(root / "a.tar", [(name, fakes.picture(number)) for number, name in enumerate(names)])
    rows: Rows = {"a.tar/cat/1.png": ("cat", 3), "a.tar/cat/2.png": ("cat", 1)}
    return Wanted(
        source="a.tar",
        class_names=("cat", "dog"),
        train={**rows, "a.tar/dog/3.png": ("dog", 2)},
        rejects={"a.tar/cat/1.png": ""},
    )


@case(ARCHIVES)
def hard_and_symbolic_links(root: Path) -> Wanted:
    names = ["cat/1.png", "cat/2.png", "dog/3.png"]
    path = root / "a.tar"
    fakes.tar(path, [(name, fakes.picture(number)) for number, name in enumerate(names)])
    fakes.add_link(path, "dog/4.png", "cat/1.png", tarfile.LNKTYPE)
    fakes.add_link(path, "dog/5.png", "../cat/2.png", tarfile.SYMTYPE)
    rows = numbered({f"a.tar/{name}": name[:3] for name in names})
    copies: Rows = {"a.tar/dog/4.png": ("dog", 0), "a.tar/dog/5.png": ("dog", 1)}
    settings = {"duplicates": "keep"}
    classes = ("cat", "dog")
    return Wanted(source="a.tar", class_names=classes, train=rows | copies, settings=settings)


@case(ARCHIVES)
def one_folder_around_the_classes_of_a_tar(root: Path) -> Wanted:
    names = [f"flowers/{name}/{i}.png" for name in ("rose", "tulip") for i in range(2)]
    fakes.tar(root / "a.tar", [(name, fakes.picture(number)) for number, name in enumerate(names)])
    rows = numbered({f"a.tar/{name}": name.split("/")[1] for name in names})
    return Wanted(source="a.tar", class_names=("rose", "tulip"), train=rows)


@case(ARCHIVES)
def backslashes_in_a_zip(root: Path) -> Wanted:
    names = [f"{name}\\{i}.png" for name in ("rose", "tulip") for i in range(2)]
    members = {name: fakes.picture(number) for number, name in enumerate(names)}
    fakes.zipped(root / "a.zip", members)
    rows = numbered({f"a.zip/{name}": name.split("\\")[0] for name in names})
    return Wanted(source="a.zip", class_names=("rose", "tulip"), train=rows)


@case(ARCHIVES)
def utf8_names_without_the_flag(root: Path) -> Wanted:
    """Training in a zip of macOS, validation in folders in the other form of Unicode."""
    names = ["café/0.png", "thé/1.png"]
    members = {name: fakes.picture(number) for number, name in enumerate(names)}
    fakes.zipped(root / "a.zip", members, without_flag=True)
    apart = [unicodedata.normalize("NFD", name) for name in names]
    fakes.folder(root / "val", apart, first=2)
    return Wanted(
        source="a.zip",
        settings={"val_source": str(root / "val")},
        class_names=("café", "thé"),
        train=numbered({f"train/a.zip/{name}": name.split("/")[0] for name in names}),
        val=numbered(dict(zip((f"val/{name}" for name in apart), ("café", "thé"), strict=True)), 2),
    )


@case(ARCHIVES)
def sparse_member(root: Path) -> Wanted:
    shades = np.zeros((64, 64, 3), np.uint8)
    shades[:8] = shades[-8:] = (10, 200, 30)
    fakes.sparse_tar(root / "a.tar", "cat/big.bmp", encoded(shades, "BMP"))
    side = {"resolution_px": 64}
    rows: Rows = {"a.tar/cat/big.bmp": ("cat", shades)}
    return Wanted(source="a.tar", class_names=("cat",), train=rows, settings=side)
