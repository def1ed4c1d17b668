"""Parquet files: labels of every type, lists of names, row groups of any size, empty cells."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.fuzz.content import Row, Source
from tests.fuzz.draws import Draw, composed, different_names, picture

NO_LABEL = "no label"
"""Stands for a cell that names no class."""


def build(draw: Draw, folder: Path) -> Source:
    """One Parquet file with columns `image` and `label`."""
    source = Source(folder / f"{different_names(draw, 1)[0]}.parquet")
    count = draw.number(1, 12)
    pictures = [picture(number, draw.pick((".png", ".jpg"))) for number in range(count)]
    make_labels = draw.pick((_names, _whole_numbers, _fractions, _class_labels, _nothing, _bytes))
    cells, names, metadata, source.class_names = make_labels(draw, count)
    broken = {row for row in range(1, count) if draw.chance(0.05)}
    for row in range(count):
        key = f"{source.path.name}/{row:08d}"
        if names[row] == NO_LABEL:
            source.rejects[key] += 1
        elif row in broken:
            source.unreadable.add(key)
            source.rows[key] = Row(names[row], b"")
        else:
            source.rows[key] = Row(names[row], pictures[row])
    images = [None if row in broken else pictures[row] for row in range(count)]
    table = pa.table({"image": _image_column(draw, images), "label": cells})
    if make_labels is _nothing:
        table = table.drop_columns(["label"])
    elif draw.chance(0.5):
        extra = pa.array([f"caption {row}" for row in range(count)])
        table = table.append_column("caption", extra)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    _write(draw, table, source)
    return source


def _write(draw: Draw, table: pa.Table, source: Source) -> None:
    source.has_checksums = draw.chance(0.4)
    pq.write_table(
        table,
        source.path,
        row_group_size=draw.number(1, len(table)),
        compression=draw.pick(("NONE", "SNAPPY", "ZSTD", "GZIP")),
        use_dictionary=draw.chance(0.5),
        data_page_size=draw.pick((64, 1024, 1 << 20)),
        data_page_version=draw.pick(("1.0", "2.0")),
        write_page_checksum=source.has_checksums,
    )
    size = source.path.stat().st_size
    footer = int.from_bytes(source.path.read_bytes()[-8:-4], "little")
    source.targets = [("little", size - 8, 4)]
    source.targets += [("raw", size - 8 - footer + step, 1) for step in range(0, footer, 7)]


def _image_column(draw: Draw, images: Sequence[bytes | None]) -> pa.Array:
    kind = draw.pick(("struct", "binary", "large"))
    if kind == "struct":
        return pa.array([{"bytes": data, "path": None} for data in images])
    return pa.array(images, pa.large_binary() if kind == "large" else pa.binary())


Labels = tuple[pa.Array, list[str], dict[str, Any] | None, tuple[str, ...] | None]
"""Cells, their classes, metadata of the file, stated class names."""


def _with_gaps(draw: Draw, values: list[Any], names: list[str], gap: Any) -> None:
    """Take the label from some rows, never from the first."""
    for row in range(1, len(values)):
        if draw.chance(0.1):
            values[row], names[row] = gap, NO_LABEL


def _names(draw: Draw, count: int) -> Labels:
    classes = different_names(draw, 3)
    cells: list[Any] = [draw.pick(classes) for _ in range(count)]
    names = [composed(name) for name in cells]
    _with_gaps(draw, cells, names, draw.pick((None, "", "  ")))
    kind = draw.pick((pa.string(), pa.large_string()))
    column = pa.array(cells, kind)
    return (column.dictionary_encode() if draw.chance(0.3) else column), names, None, None


def _bytes(draw: Draw, count: int) -> Labels:
    cells, names, metadata, order = _names(draw, count)
    values = [None if text is None else text.encode() for text in cells.to_pylist()]
    return pa.array(values, pa.binary()), names, metadata, order


def _whole_numbers(draw: Draw, count: int) -> Labels:
    cells: list[Any] = [draw.number(0, 12) for _ in range(count)]
    names = [str(number) for number in cells]
    kind = draw.pick((pa.int64(), pa.int32(), pa.int8(), pa.uint8()))
    _with_gaps(draw, cells, names, None if kind == pa.uint8() else draw.pick((None, -1)))
    metadata = draw.pick((None, {"info": {"features": None}}, {"info": None}, {}))
    return pa.array(cells, kind), names, metadata, None


def _fractions(draw: Draw, count: int) -> Labels:
    cells: list[Any] = [float(draw.number(0, 12)) for _ in range(count)]
    names = [str(int(number)) for number in cells]
    _with_gaps(draw, cells, names, draw.pick((None, math.nan, -1.0, 0.5)))
    return pa.array(cells, draw.pick((pa.float64(), pa.float32()))), names, None, None


def _class_labels(draw: Draw, count: int) -> Labels:
    stated = [composed(name) for name in different_names(draw, draw.number(2, 5))]
    cells: list[Any] = [draw.number(0, len(stated) - 1) for _ in range(count)]
    names = [stated[number] for number in cells]
    _with_gaps(draw, cells, names, draw.pick((None, -1)))
    features = {"label": {"names": stated, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    return pa.array(cells, pa.int64()), names, {"info": {"features": features}}, tuple(stated)


def _nothing(draw: Draw, count: int) -> Labels:
    return pa.nulls(count), ["all"] * count, None, None
