"""Stated labels: values of every type, and label files whole and damaged."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from drorae.data.readers.candidates import ReadRule
from drorae.data.readers.labels import BadLabel, label_text, stated_by_files
from tests.fuzz.content import Fault
from tests.fuzz.damage import ACCIDENTS
from tests.fuzz.draws import Draw, composed, different_names

NESTED = "[" * 100_000

ODD_JSON: tuple[str, ...] = (
    *(
        "",
        "null",
        "[]",
        "{}",
        "3",
        '"labels"',
        '{"labels": null}',
        '{"labels": {}}',
        '{"labels": 3}',
    ),
    *('{"labels": [1]}', '{"labels": [["a.png"]]}', '{"labels": [["a.png", 1, 2]]}', "\ufeff{}"),
    *('{"labels": [["a.png", 1e999]]}', '{"labels": [["a.png", NaN]]}', '{"labels": [[3, 3]]}'),
    *('{"labels": [["a.png", "\\ud800"]]}', '{"labels": [["\\udfff", 1]]}', '{"labels": [null]}'),
    *('{"labels": [["a.png", {"a": 1}]]}', '{"labels": [["../a.png", 1]]}', '{"labels": "ab"}'),
    *('{"file_name": "a.png", "label": 1e999}', '{"file_name": ["a.png"], "label": 1}'),
    *('{"file_name": "a.png", "label": "\\ud83d"}', '{"file_name": null}', "{}\n\n[]", NESTED),
    *('{"labels": [["a.png", ' + "9" * 5000 + "]]}", '{"labels": ' + NESTED + "}"),
    *('file_name,label\n"a.png', "file_name\na.png,1,2", "file_name,label\n,\n", "a\0b,c\n1,2\n"),
    *("file_name,label\na.png," + "x" * 200_000, "label,label,file_name\n1,2,a.png\n"),
)
"""Documents that a label file could hold by mistake."""

NAMES = ("dataset.json", "metadata.jsonl", "metadata.csv", "metadata.parquet")


def run(draw: Draw, folder: Path, is_damaged: bool) -> None:
    """Convert values, and read one good or damaged label file.

    Raises:
        Fault: The result is wrong.
    """
    check_values(draw)
    name = draw.pick(NAMES)
    data, wanted = _document(draw, name)
    if is_damaged and draw.chance(0.5):
        data = draw.pick(ODD_JSON).encode()
    elif is_damaged:
        changed = bytearray(data)
        ACCIDENTS[draw.pick(tuple(ACCIDENTS))](draw, changed)
        data = bytes(changed)
    (folder / name).write_bytes(data)
    try:
        stated = stated_by_files({f"sub/{name}": data}, ReadRule())
    except ValueError as error:
        if name not in str(error):
            raise Fault(f"the error does not name {name}: {error}") from error
        str(error).encode()
        if not is_damaged:
            raise Fault(f"a good file is refused: {error}") from error
        return
    if not is_damaged and dict(stated.label_of) != wanted:
        raise Fault(f"labels {dict(stated.label_of)} instead of {wanted}")
    if not is_damaged and (stated.rejects or not stated.decides):
        raise Fault(f"rejects {stated.rejects}")
    _check_texts(stated.label_of.values(), stated.rejects.values(), (n.text for n in stated.notes))


def _check_texts(*groups: Any) -> None:
    for group in groups:
        for text in group:
            if not isinstance(text, str):
                raise Fault(f"no text: {text!r}")
            text.encode("utf-8")


def check_values(draw: Draw) -> None:
    """A label in any of the types in which it is stated is the same class."""
    number = draw.number(0, 1000)
    name = different_names(draw, 1)[0]
    same: dict[str, tuple[Any, ...]] = {
        str(number): (
            *(number, float(number), np.int64(number), np.float32(number), str(number)),
            *(f"{number}\n", f"\ufeff{number}\r\n".encode(), np.uint16(number)),
        ),
        composed(name): (name, f" {name}\n", name.encode(), b"\xef\xbb\xbf" + name.encode()),
        "": (None, "", " \n", b"", math.nan, -1, -1.0, np.int8(-1), np.float64("nan")),
    }
    for wanted, values in same.items():
        value = draw.pick(values)
        if label_text(value) != wanted:
            raise Fault(f"label {value!r} is {label_text(value)!r} instead of {wanted!r}")
    bad = draw.pick(
        ([], [1], {}, {"a": 1}, True, False, 0.5, math.inf, -math.inf, np.bool_(True), 1j)
    )
    try:
        found = label_text(bad)
    except BadLabel as error:
        str(error).encode()
        return
    raise Fault(f"label {bad!r} is {found!r} instead of refused")


def _document(draw: Draw, name: str) -> tuple[bytes, dict[str, str]]:
    """A good label file, and the labels by path of a file in the folder `sub`."""
    classes = [f"k{name}" for name in different_names(draw, 3)]
    if draw.chance(0.5):
        classes = ["0", "3", "12"]
    images = [f"{stem}.png" for stem in different_names(draw, draw.number(1, 6))]
    labels = [draw.pick(classes) for _ in images]
    wanted = {
        f"sub/{composed(image)}": composed(label)
        for image, label in zip(images, labels, strict=True)
    }
    values = [int(label) if label.isdecimal() else label for label in labels]
    if name == "dataset.json":
        pairs = [list(pair) for pair in zip(images, values, strict=True)]
        return json.dumps({"labels": pairs}).encode(), wanted
    rows = [{"file_name": i, "label": v} for i, v in zip(images, values, strict=True)]
    if name == "metadata.jsonl":
        return "\n".join(json.dumps(row) for row in rows).encode(), wanted
    if name == "metadata.parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue().to_pybytes(), wanted
    buffer = io.StringIO()
    table = csv.DictWriter(buffer, ["file_name", "label"])
    table.writeheader()
    table.writerows(rows)
    return buffer.getvalue().encode("utf-8-sig"), wanted
