"""Folders: classes, splits, wrappers, flat ones, label files; links, loops, odd names."""

import csv
import io
import json
from pathlib import Path

from tests.fuzz.content import Row, Source
from tests.fuzz.draws import FORMATS, Draw, composed, different_names, picture

NO_IMAGES = (".hidden.png", "notes.txt", "._1.jpg", ".DS_Store", "a.PDF")
"""Files that are no images and no labels."""

SPLIT_FOLDERS = {"train": "train", "val": "val"}
"""Folder to split."""


class FolderWriter:
    """A folder whose files are known."""

    def __init__(self, draw: Draw, path: Path) -> None:
        self.draw, self.source = draw, Source(path)
        self.count = 0

    def add(self, name: str, data: bytes) -> None:
        path = self.source.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def image(self, folder: str, class_name: str, split: str = "") -> str:
        """A picture that is a row; returns its name."""
        name, data = self.picture(folder)
        self.source.rows[name] = Row(class_name, data, split)
        return name

    def refused(self, folder: str) -> str:
        """A picture that is none; returns its name."""
        name, _ = self.picture(folder)
        self.source.rejects[name] += 1
        return name

    def picture(self, folder: str) -> tuple[str, bytes]:
        suffix = self.draw.pick(tuple(FORMATS))
        stem = different_names(self.draw, 1)[0] + self.draw.pick(("", "", ".v1", ".tar"))
        data = picture(self.count, suffix)
        name = f"{folder}{self.count}-{stem}{suffix}"
        self.count += 1
        self.add(name, data)
        return name, data


def build(draw: Draw, folder: Path) -> Source:
    """A folder of one of the known layouts."""
    path = folder / different_names(draw, 1)[0]
    path.mkdir()
    writer = FolderWriter(draw, path)
    for name in draw.some(NO_IMAGES, draw.number(0, 2)):
        writer.add(name, draw.bytes(draw.number(0, 99)))
        if not name.startswith("."):
            writer.source.rejects[name] += 1
    draw.pick((_classes, _classes, _splits, _flat, _metadata, _dataset_json))(writer)
    return writer.source


def damage_target(draw: Draw, source: Source) -> Path:
    """The file of the folder that an accident meets: a label file if there is one."""
    files = sorted(path for path in source.path.rglob("*") if path.is_file() and path.exists())
    labels = [path for path in files if path.name in ("dataset.json",) or "metadata" in path.name]
    return draw.pick(labels if labels and draw.chance(0.8) else files)


def _classes(writer: FolderWriter) -> None:
    draw = writer.draw
    top = f"{different_names(draw, 1)[0]}/" if draw.chance(0.3) else ""
    classes = different_names(draw, draw.number(2, 4))
    first = ""
    for number in range(draw.number(2, 10)):
        class_name = classes[number % len(classes)]
        below = "deeper/" if draw.chance(0.2) else ""
        name = writer.image(f"{top}{class_name}/{below}", composed(class_name))
        first = first or name
    folder = writer.source.path / top / classes[0]
    if draw.chance(0.2):
        (folder / "gone.png").symlink_to("nowhere.png")
        writer.source.rejects[f"{top}{classes[0]}/gone.png"] += 1
    if draw.chance(0.2):
        (folder / "again").symlink_to(writer.source.path)
        writer.source.rejects[f"{top}{classes[0]}/again"] += 1
    if draw.chance(0.2):
        (folder / "link.png").symlink_to(writer.source.path / first)
        row = writer.source.rows[first]
        writer.source.rows[f"{top}{classes[0]}/link.png"] = Row(composed(classes[0]), row.data)


def _splits(writer: FolderWriter) -> None:
    classes = different_names(writer.draw, writer.draw.number(2, 3))
    for folder, split in SPLIT_FOLDERS.items():
        for number in range(writer.draw.number(len(classes), 6)):
            class_name = classes[number % len(classes)]
            writer.image(f"{folder}/{class_name}/", composed(class_name), split)


def _flat(writer: FolderWriter) -> None:
    for _ in range(writer.draw.number(1, 6)):
        writer.image("", "all")


def _metadata(writer: FolderWriter) -> None:
    """A Hugging Face image folder: metadata.jsonl or metadata.csv with file_name and label."""
    draw = writer.draw
    rows: list[dict[str, object]] = []
    classes = [f"k{composed(name)}" for name in different_names(draw, 3)]
    if draw.chance(0.5):
        classes = ["0", "2", "10"]
    for number in range(draw.number(2, 8)):
        if number and draw.chance(0.15):
            writer.refused("")
            continue
        label = draw.pick(classes)
        name = writer.image("", label)
        value = int(label) if label.isdecimal() and draw.chance(0.7) else label
        rows.append({"file_name": name, "label": value, "text": 'a "quoted", text'})
    if draw.chance(0.5):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        writer.add("metadata.jsonl", text.encode())
    else:
        buffer = io.StringIO()
        table = csv.DictWriter(buffer, ["file_name", "label", "text"])
        table.writeheader()
        table.writerows(rows)
        writer.add("metadata.csv", buffer.getvalue().encode(draw.pick(("utf-8", "utf-8-sig"))))


def _dataset_json(writer: FolderWriter) -> None:
    """StyleGAN's layout, unpacked."""
    labels: list[list[object]] = []
    for number in range(writer.draw.number(2, 8)):
        label = writer.draw.number(0, 11)
        labels.append([writer.image(f"{number // 4:05d}/", str(label)), label])
    writer.add("dataset.json", json.dumps({"labels": labels}).encode())
