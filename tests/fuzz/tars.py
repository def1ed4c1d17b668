"""Tars: class folders, webdataset samples, flat ones; links, sparse members, names twice."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.fuzz.content import Row, Source
from tests.fuzz.damage import BLOCK_BYTES
from tests.fuzz.draws import FORMATS, Draw, composed, different_names, encode, picture

NUMBERS = ("0", "2", "10")

FORMATS_OF_TAR = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)

NO_IMAGES = ("README.md", "._7.jpg", "sub/.hidden.png", "more.tar", "labels.txt", "a/.DS_Store")
"""Entries that are no images and no labels."""


class TarWriter:
    """A tar in memory whose members are known."""

    def __init__(self, draw: Draw, path: Path) -> None:
        self.draw, self.source = draw, Source(path)
        self.format = draw.pick(FORMATS_OF_TAR)
        self.buffer = io.BytesIO()
        self.archive = tarfile.TarFile(None, "w", self.buffer, self.format)
        self.prefix = "./" if draw.chance(0.3) else ""

    def add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(self.prefix + name)
        info.size = len(data)
        self.archive.addfile(info, io.BytesIO(data))

    def key(self, name: str) -> str:
        return f"{self.source.path.name}/{name}"

    def image(self, name: str, class_name: str, data: bytes) -> None:
        """A picture that is a row of this class."""
        self.add(name, data)
        self.source.rows[self.key(name)] = Row(class_name, data)

    def close(self) -> Source:
        self.archive.close()
        data = self.buffer.getvalue()
        self.source.path.write_bytes(data)
        self.source.repair = repair_checksums
        self.source.targets, extended = _fields(data)
        self.source.has_header_checksums = not extended
        return self.source


def build(draw: Draw, folder: Path) -> Source:
    """A tar of one of the known layouts."""
    writer = TarWriter(draw, folder / f"{different_names(draw, 1)[0]}.tar")
    for name in draw.some(NO_IMAGES, draw.number(0, 3)):
        writer.add(name, draw.bytes(draw.number(0, 600)))
        if name.endswith(".tar"):
            writer.source.rejects[writer.key(name)] += 1
    draw.pick((_class_folders, _class_folders, _samples, _samples, _flat))(writer)
    return writer.close()


def _class_folders(writer: TarWriter) -> None:
    draw = writer.draw
    top = f"{different_names(draw, 1)[0]}/" if draw.chance(0.4) else ""
    classes = different_names(draw, draw.number(2, 4))
    last = ""
    for number in range(draw.number(2, 10)):
        class_name = classes[number % len(classes)]
        below = "deeper/" if draw.chance(0.2) else ""
        suffix = draw.pick(tuple(FORMATS))
        last = f"{top}{class_name}/{below}{number}.{odd_dots(draw)}x{suffix}"
        writer.image(last, composed(class_name), picture(number, suffix))
    if draw.chance(0.3):  # as `tar -r` replaces a member: the last one counts
        old = writer.source.rows[writer.key(last)]
        writer.image(last, old.class_name, picture(77))
        writer.source.rejects[writer.key(last)] += 1
    if draw.chance(0.3):
        _link(writer, last, f"{top}{classes[0]}/link.png", composed(classes[0]))
    if draw.chance(0.3):
        name = f"{top}{classes[0]}/sparse.bmp"
        data = add_sparse(writer, name)
        writer.source.rows[writer.key(name)] = Row(composed(classes[0]), data)


def odd_dots(draw: Draw) -> str:
    """Nothing, or parts of a name with dots."""
    return draw.pick(("", "", "v1.", "a.b.", "jpg."))


def _link(writer: TarWriter, target: str, name: str, class_name: str) -> None:
    info = tarfile.TarInfo(writer.prefix + name)
    info.type = writer.draw.pick((tarfile.LNKTYPE, tarfile.SYMTYPE))
    climbs = "../" * name.count("/") if info.type == tarfile.SYMTYPE else writer.prefix
    info.linkname = climbs + target
    writer.archive.addfile(info)
    data = writer.source.rows[writer.key(target)].data
    writer.source.either[writer.key(name)] = Row(class_name, data)


def add_sparse(writer: TarWriter, name: str) -> bytes:
    """Add a picture as GNU tar's `-S` stores one: a map of what is no hole, then only that."""
    shades = np.zeros((40, 40, 3), np.uint8)
    shades[:4] = shades[-4:] = (10, 200, 30)
    data = encode(Image.fromarray(shades), "BMP")
    blocks = [data[i : i + BLOCK_BYTES] for i in range(0, len(data), BLOCK_BYTES)]
    places = [(i * BLOCK_BYTES, block) for i, block in enumerate(blocks) if any(block)]
    stored = b"".join(block for _, block in places)
    header = bytearray(BLOCK_BYTES)
    _put(header, 0, (writer.prefix + name).encode()[:100])
    for start, length, number in (
        (100, 8, 0o644),
        (108, 8, 0),
        (116, 8, 0),
        (124, 12, len(stored)),
    ):
        _put(header, start, f"{number:0{length - 1}o}".encode())
    _put(header, 136, b"00000000000")
    _put(header, 156, b"S")
    _put(header, 257, b"ustar  ")
    runs = _joined([(start, len(block)) for start, block in places], len(data))
    for number, (start, length) in enumerate(runs):
        _put(header, 386 + 24 * number, f"{start:011o}\0{length:011o}".encode())
    _put(header, 483, f"{len(data):011o}".encode())
    _set_checksum(header, 0)
    file = writer.archive.fileobj
    padding = bytes(-len(stored) % BLOCK_BYTES)
    file.write(bytes(header) + stored + padding)  # pyright: ignore[reportOptionalMemberAccess]
    writer.archive.offset += BLOCK_BYTES + len(stored) + len(padding)
    return data


def _joined(runs: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for start, length in runs:
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((start, length))
    if len(found) > 4:
        raise ValueError(f"{len(found)} runs do not fit a header of 4, picture of {size} bytes")
    return found


def _put(header: bytearray, start: int, value: bytes) -> None:
    header[start : start + len(value)] = value


def _samples(writer: TarWriter) -> None:
    """Webdataset: NAME.jpg beside NAME.cls or NAME.json."""
    draw = writer.draw
    folder = "train/" if draw.chance(0.3) else ""
    classes = [composed(name) for name in different_names(draw, draw.number(2, 4))]
    if draw.chance(0.5):
        classes = list(NUMBERS)
    state = draw.pick((_state_cls, _state_json))
    stems = different_names(draw, draw.number(2, 8))
    with_masks = draw.chance(0.2)
    for number, stem in enumerate(stems):
        suffix = draw.pick((".jpg", ".png", ".JPEG", ".webp"))
        name, data = f"{folder}{stem}{suffix}", picture(number, suffix)
        label = draw.pick(classes)
        is_missing = number > 1 and draw.chance(0.2)
        members = [(name, data)]
        if not is_missing:
            members.append(state(draw, folder + stem, label))
        if with_masks:
            members.append((f"{folder}{stem}.mask.png", picture(100 + number)))  # left out
        for member in members if draw.chance(0.5) else members[::-1]:
            writer.add(*member)
        if is_missing or label_is_none(members[1][1]):
            writer.source.rejects[writer.key(name)] += 1
        else:
            writer.source.rows[writer.key(name)] = Row(label, data)
    if not writer.source.rows:
        writer.image(f"{folder}zz.png", "0", picture(55))
        writer.add(f"{folder}zz.cls", b"0")


def label_is_none(label: bytes) -> bool:
    """Whether a written label names no class."""
    return label.strip() in (
        b"",
        b"-1",
        b'{"label": null}',
        b'{"label": [1, 2]}',
        b'{"label": true}',
    )


def _state_cls(draw: Draw, stem: str, label: str) -> tuple[str, bytes]:
    data = label.encode()
    dressed = (data, data + b"\n", b"\xef\xbb\xbf" + data, b" " + data + b"\r\n", b"-1", b"")
    return f"{stem}{draw.pick(('.cls', '.cls', '.CLS'))}", draw.pick(dressed)


def _state_json(draw: Draw, stem: str, label: str) -> tuple[str, bytes]:
    value: object = int(label) if label in NUMBERS and draw.chance(0.7) else label
    value = float(value) if isinstance(value, int) and draw.chance(0.3) else value
    value = draw.pick((value, value, value, value, None, [1, 2], True))
    return f"{stem}.json", json.dumps({"label": value}, ensure_ascii=draw.chance(0.5)).encode()


def _flat(writer: TarWriter) -> None:
    for number, name in enumerate(different_names(writer.draw, writer.draw.number(1, 6))):
        suffix = writer.draw.pick(tuple(FORMATS))
        writer.image(f"{name}{suffix}", "all", picture(number, suffix))


def _fields(data: bytes) -> tuple[list[tuple[str, int, int]], bool]:
    """Fields of the headers, and whether any says something in content without a checksum."""
    fields: list[tuple[str, int, int]] = []
    extended = False
    offset = 0
    while offset + BLOCK_BYTES <= len(data) and any(data[offset : offset + BLOCK_BYTES]):
        size = int(data[offset + 124 : offset + 135].rstrip(b"\0 ") or b"0", 8)
        kind = data[offset + 156 : offset + 157]
        extended |= kind in b"xgLKS"
        fields += [
            ("octal", offset + 124, 12),
            ("octal", offset + 136, 12),
            ("raw", offset + 156, 1),
        ]
        fields += [("raw", offset, 8), ("raw", offset + 157, 8), ("raw", offset + 345, 8)]
        if kind == b"S":
            fields += [("octal", offset + 386 + 12 * i, 12) for i in range(4)]
            fields += [("octal", offset + 483, 12), ("raw", offset + 482, 1)]
        offset += BLOCK_BYTES + size + -size % BLOCK_BYTES
    return fields, extended


def repair_checksums(data: bytearray) -> None:
    """Make the checksum of every block that looks like a header right."""
    for offset in range(0, len(data) - BLOCK_BYTES + 1, BLOCK_BYTES):
        if data[offset + 257 : offset + 262] == b"ustar":
            _set_checksum(data, offset)


def _set_checksum(data: bytearray, offset: int) -> None:
    data[offset + 148 : offset + 156] = b" " * 8
    total = sum(data[offset : offset + BLOCK_BYTES])
    data[offset + 148 : offset + 156] = f"{total:06o}\0 ".encode()
