"""One tree of odd names as a folder, a tar and a zip: the same classes and pictures from each."""

import io
import tarfile
import zipfile
from pathlib import Path

from tests.fuzz.content import Fault, Row, Source, check_clean, read
from tests.fuzz.draws import Draw, composed, different_names, picture

BODIES = (
    "a",
    "ab",
    "x" * 60,
    "café",
    "cafe\u0301",
    "\u732b",
    "a b",
    "100%",
    "#1",
    "q?",
    "[x]",
)

ENDS = (".png", ".PNG", ".Png", ".v1.png", "..png", ".tar.png", " .png", ".mask.PNG")


def run(draw: Draw, folder: Path, is_damaged: bool) -> None:
    """Write the tree in every form and compare what is read; names are never damaged.

    Raises:
        Fault: A form gives other classes or pictures.
    """
    tree = _tree(draw)
    if is_damaged:
        tree = {name.replace("x", "\n\t\x7f"): content for name, content in tree.items()}
    for write in (_folder, _tar, _zip):
        path, prefix = write(folder, tree)
        source = Source(path)
        source.rows = {
            prefix + name: Row(composed(name.split("/")[0]), data) for name, data in tree.items()
        }
        try:
            check_clean(source, read(source))
        except Fault as fault:
            raise Fault(f"{path.suffix or 'folder'}: {fault}") from fault


def _tree(draw: Draw) -> dict[str, bytes]:
    classes = different_names(draw, draw.number(2, 4))
    tree: dict[str, bytes] = {}
    for number in range(draw.number(2, 9)):
        class_name = classes[number % len(classes)]
        below = draw.pick(("", "", "sub/", "sub.d/x y/"))
        name = f"{class_name}/{below}{number}{draw.pick(BODIES)}{draw.pick(ENDS)}"
        tree[name] = picture(number)
    return tree


def _folder(folder: Path, tree: dict[str, bytes]) -> tuple[Path, str]:
    for name, data in tree.items():
        path = folder / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder / "tree", ""


def _tar(folder: Path, tree: dict[str, bytes]) -> tuple[Path, str]:
    with tarfile.open(folder / "tree.tar", "w") as archive:
        for name, data in tree.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return folder / "tree.tar", "tree.tar/"


def _zip(folder: Path, tree: dict[str, bytes]) -> tuple[Path, str]:
    with zipfile.ZipFile(folder / "tree.zip", "w") as archive:
        for name, data in tree.items():
            archive.writestr(name, data)
    return folder / "tree.zip", "tree.zip/"
