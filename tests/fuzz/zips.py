"""Zips: class folders with and without a top folder, dataset.json; names of old tools."""

import io
import json
import struct
import zipfile
from pathlib import Path

from tests.fuzz.content import Row, Source
from tests.fuzz.draws import FORMATS, Draw, composed, different_names, picture

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)

UTF8_FLAG = 0x800

NO_IMAGES = ("README.md", "__MACOSX/a/._1.jpg", "a/.hidden.png", "old.zip", "a/Thumbs.db")
"""Entries that are no images and no labels."""

CENTRAL_FIELDS = {8: 2, 10: 2, 16: 4, 20: 4, 24: 4, 28: 2, 30: 2, 32: 2, 42: 4, 46: 4}
"""Offset to length in an entry of the directory: flags, method, CRC, sizes, place, name."""

LOCAL_FIELDS = {6: 2, 8: 2, 14: 4, 18: 4, 22: 4, 26: 2, 28: 2, 30: 4}
"""The same in the header of a member."""

END_FIELDS = {4: 2, 8: 2, 10: 2, 12: 4, 16: 4, 20: 2}
"""The same in the end of the directory."""


class ZipWriter:
    """A zip in memory whose members are known."""

    def __init__(self, draw: Draw, path: Path) -> None:
        self.draw, self.source = draw, Source(path, has_checksums=True)
        self.buffer: io.BytesIO | Unseekable = io.BytesIO()
        if draw.chance(0.2):  # descriptors behind the members
            self.buffer = Unseekable()
        self.archive = zipfile.ZipFile(self.buffer, "w")
        self.method = draw.pick(METHODS)
        self.backslashes = draw.chance(0.15)
        self.without_flag = draw.chance(0.2)

    def add(self, name: str, data: bytes) -> None:
        info = zipfile.ZipInfo(name)
        info.filename = name.replace("/", "\\") if self.backslashes else name
        self.archive.writestr(info, data, self.method)

    def key(self, name: str) -> str:
        name = name.replace("/", "\\") if self.backslashes else name
        return f"{self.source.path.name}/{name}"

    def image(self, name: str, class_name: str, data: bytes) -> None:
        self.add(name, data)
        self.source.rows[self.key(name)] = Row(class_name, data)

    def close(self) -> Source:
        self.archive.close()
        data = bytearray(self.buffer.getvalue())
        if self.without_flag:
            _drop_utf8_flags(data)
        self.source.path.write_bytes(data)
        self.source.targets = list(_fields(bytes(data)))
        return self.source


class Unseekable:
    """A stream: sizes are known only behind a member."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self.parts.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Nothing waits."""

    def getvalue(self) -> bytes:
        return b"".join(self.parts)


def build(draw: Draw, folder: Path) -> Source:
    """A zip of one of the known layouts."""
    writer = ZipWriter(draw, folder / f"{different_names(draw, 1)[0]}.zip")
    if not writer.backslashes:
        for name in draw.some(NO_IMAGES, draw.number(0, 3)):
            writer.add(name, draw.bytes(draw.number(0, 600)))
            if not any(part.startswith((".", "__MACOSX")) for part in name.split("/")):
                writer.source.rejects[writer.key(name)] += 1
    draw.pick((_class_folders, _class_folders, _dataset_json, _flat))(writer)
    return writer.close()


def _class_folders(writer: ZipWriter) -> None:
    draw = writer.draw
    top = f"{different_names(draw, 1)[0]}/" if draw.chance(0.4) else ""
    classes = different_names(draw, draw.number(2, 4))
    for number in range(draw.number(2, 10)):
        class_name = classes[number % len(classes)]
        suffix = draw.pick(tuple(FORMATS))
        name = f"{top}{class_name}/{number}.v{number % 3}{suffix}"
        writer.image(name, composed(class_name), picture(number, suffix))


def _dataset_json(writer: ZipWriter) -> None:
    """StyleGAN's layout: 00000/img00000000.png, and labels in dataset.json."""
    draw = writer.draw
    writer.backslashes = False
    labels: list[list[object]] = []
    count = draw.number(2, 9)
    for number in range(count):
        name = f"{number // 4:05d}/img{number:08d}.png"
        label = draw.number(0, 11)
        if number and draw.chance(0.15):
            writer.add(name, picture(number))
            writer.source.rejects[writer.key(name)] += 1
            if draw.chance(0.5):
                labels.append([name, draw.pick((None, [1, 2], True, "", 0.5))])
            continue
        writer.image(name, str(label), picture(number))
        labels.append([name, label if draw.chance(0.8) else float(label)])
    data = json.dumps({"labels": labels}).encode()
    writer.add("dataset.json", data if draw.chance(0.8) else b"\xef\xbb\xbf" + data)


def _flat(writer: ZipWriter) -> None:
    for number, name in enumerate(different_names(writer.draw, writer.draw.number(1, 6))):
        suffix = writer.draw.pick(tuple(FORMATS))
        writer.image(f"{name}{suffix}", "all", picture(number, suffix))


def _headers(data: bytes, signature: bytes) -> list[int]:
    """Where the headers of one kind begin; pictures hold none of these signatures."""
    found, start = [], data.find(signature)
    while start >= 0:
        found.append(start)
        start = data.find(signature, start + 4)
    return found


def _drop_utf8_flags(data: bytearray) -> None:
    for signature, place in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        for start in _headers(bytes(data), signature):
            (flags,) = struct.unpack_from("<H", data, start + place)
            struct.pack_into("<H", data, start + place, flags & ~UTF8_FLAG)


def _fields(data: bytes) -> list[tuple[str, int, int]]:
    kinds = {b"PK\x01\x02": CENTRAL_FIELDS, b"PK\x03\x04": LOCAL_FIELDS, b"PK\x05\x06": END_FIELDS}
    return [
        ("little", start + place, length)
        for signature, fields in kinds.items()
        for start in _headers(data, signature)
        for place, length in fields.items()
    ]
