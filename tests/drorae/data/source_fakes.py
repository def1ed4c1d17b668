"""Sources of pictures whose pixels are known by number, in the layouts that people have."""

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from data_fakes import encoded, pixels

SIDE_PX = 16
"""Pictures are squares of this side, and so are the rows: the same pixels."""


def shades(number: int) -> np.ndarray:
    """Pixels of a picture."""
    return pixels(number, SIDE_PX, SIDE_PX)


def picture(number: int, image_format: str = "PNG", **options) -> bytes:
    return encoded(shades(number), image_format, **options)


def folder(root: Path, names: Sequence[str], first: int = 0) -> Path:
    """Pictures number first, first + 1, ... as PNG under these names."""
    for number, name in enumerate(names, first):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return root


def tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def add_link(path: Path, name: str, target: str, kind: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    with tarfile.open(path, "a") as archive:
        archive.addfile(info)


def sparse_tar(path: Path, name: str, data: bytes) -> Path:
    """A tar of one member as `tar -S` writes it: of its blocks of 512 only those not all zero."""
    blocks = [data[i : i + 512] for i in range(0, len(data), 512)]
    runs: list[tuple[int, int]] = []
    for number, block in enumerate(blocks):
        if any(block) and runs and sum(runs[-1]) == 512 * number:
            runs[-1] = (runs[-1][0], runs[-1][1] + len(block))
        elif any(block):
            runs.append((512 * number, len(block)))
    stored = b"".join(data[start : start + size] for start, size in runs)
    header = bytearray(512)
    fields = {0: name, 100: "0000644", 108: "0000000", 116: "0000000", 124: f"{len(stored):011o}"}
    fields |= {136: "00000000000", 148: " " * 8, 156: "S", 257: "ustar  ", 483: f"{len(data):011o}"}
    fields |= {386 + 24 * i: f"{s:011o}\0{n:011o}" for i, (s, n) in enumerate(runs[:4])}
    assert len(runs) <= 4
    for start, text in fields.items():
        header[start : start + len(text)] = text.encode()
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    path.write_bytes(bytes(header) + stored + bytes(-len(stored) % 512 + 1024))
    return path


def zipped(path: Path, members: Mapping[str, bytes], without_flag: bool = False) -> Path:
    """A zip; `without_flag` leaves out that names are UTF-8, as macOS does."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo("x")
            info.filename = name  # its constructor would turn backslashes on Windows
            archive.writestr(info, data)
    if without_flag:
        data = bytearray(path.read_bytes())
        for signature, place in ((b"PK\x01\x02", 9), (b"PK\x03\x04", 7)):
            start = data.find(signature)
            while start >= 0:
                data[start + place] &= ~0x08
                start = data.find(signature, start + 1)
        path.write_bytes(data)
    return path


def class_label(names: Sequence[str]) -> dict:
    """Metadata as the library `datasets` writes it."""
    return {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}


def parquet(
    path: Path,
    columns: Mapping[str, Sequence],
    first: int = 0,
    metadata: dict | None = None,
    **kwargs,
) -> Path:
    """Pictures number first, first + 1, ... in the column `image` beside these columns."""
    count = len(next(iter(columns.values())))
    images = [{"bytes": picture(first + row), "path": None} for row in range(count)]
    table = pa.table({"image": images, **{name: list(cells) for name, cells in columns.items()}})
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **kwargs)
    return path


def damage_row_group(path: Path, group: int) -> Path:
    """Overwrite the pictures of a row group and what says how long they are."""
    column = pq.ParquetFile(path).metadata.row_group(group).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 200] = b"\xff" * 200
    path.write_bytes(data)
    return path
