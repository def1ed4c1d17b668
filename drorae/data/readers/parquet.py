"""Parquet tables with an image column (bytes, or a struct with `bytes`) and a label column.

Rows are read a row group at a time, because a single row cannot be read on its own.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from drorae.data.readers.candidates import (
    Candidate,
    Listing,
    Record,
    group_by_container,
    printable,
)
from drorae.data.readers.filesystem import open_file


def list_parquet(uri: str, name: str, image_column: str, label_column: str) -> Listing:
    """List the rows of one Parquet file.

    Args:
        uri: The Parquet file.
        name: Its name inside the source; keys start with it.
        image_column: Column of encoded images.
        label_column: Column of class names or numbers; may be absent.

    Raises:
        ValueError: The image column is missing; the columns that exist are named.
    """
    with open_file(uri) as file:
        try:
            table = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            return Listing([], [(printable(name), f"Parquet file is damaged: {error}")])
        columns = table.schema_arrow.names
        if image_column not in columns:
            raise ValueError(
                f"{uri!r} has no column {image_column!r}: expected encoded images there. "
                f"Set shard.image_column to one of {columns}."
            )
        labels: list[Any] = [""] * table.metadata.num_rows
        if label_column in columns:
            labels = table.read(columns=[label_column]).column(0).to_pylist()
        class_names = _stated_class_names(table.schema_arrow, label_column)
    candidates = [
        Candidate(
            key=f"{printable(name)}/{row:08d}",
            class_name=_class_name(label, class_names),
            split="",
            kind="parquet",
            container=uri,
            index=row,
            member=image_column,
        )
        for row, label in enumerate(labels)
    ]
    return Listing(candidates=candidates, rejects=[], class_names=class_names)


def _class_name(label: Any, class_names: tuple[str, ...]) -> str:
    if isinstance(label, int) and 0 <= label < len(class_names):
        return class_names[label]
    return "" if label is None else str(label)


def _stated_class_names(schema: pa.Schema, label_column: str) -> tuple[str, ...]:
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    feature = json.loads(text).get("info", {}).get("features", {}).get(label_column, {})
    return tuple(feature.get("names", ()))


def read_parquet(candidates: Sequence[Candidate]) -> Iterator[Record]:
    """Read rows; each row group that holds a wanted row is read once per run of candidates."""
    for container, rows in group_by_container(candidates):
        try:
            with open_file(container) as file:
                yield from _read_rows(pq.ParquetFile(file), rows)
        except (OSError, pa.ArrowInvalid) as error:
            yield from (Record(c, None, f"cannot be read: {error}") for c in rows)


def _read_rows(table: pq.ParquetFile, rows: Sequence[Candidate]) -> Iterator[Record]:
    sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
    starts = [0, *itertools.accumulate(sizes)]
    loaded, column = -1, pa.chunked_array([[]])
    for candidate in rows:
        group = next(i for i, s in enumerate(starts[1:]) if candidate.index < s)
        if group != loaded:
            column = table.read_row_group(group, columns=[candidate.member]).column(0)
            loaded = group
        value = column[candidate.index - starts[group]].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(data, bytes):
            yield Record(candidate, data)
        else:
            yield Record(candidate, None, f"row holds no image bytes but {type(data).__name__}")
