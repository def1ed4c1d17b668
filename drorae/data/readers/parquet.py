"""Parquet tables with an image column (bytes, or a struct with `bytes`) and a label column.

Rows are read a row group at a time, because a single row cannot be read on its own.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from drorae.data.readers.candidates import (
    Candidate,
    Listing,
    ReadRule,
    Record,
    group_by_container,
    joined,
    listed,
    printable,
)
from drorae.data.readers.filesystem import open_file

BATCH_ROWS = 64
"""Rows decoded at a time."""

BUFFER_BYTES = 4 << 20
"""Bytes of a column that one request reads."""


def list_parquet(uri: str, name: str, rule: ReadRule) -> Listing:
    """List the rows of one Parquet file.

    Args:
        uri: The Parquet file.
        name: Its name inside the source; keys start with it.
        rule: Column of encoded images, and column of class names or numbers.

    Raises:
        ValueError: The image column is missing; the columns that exist are named.
    """
    image_column, label_column = rule.image_column, rule.label_column or ""
    with open_file(uri) as file:
        try:
            parquet = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            return Listing(joined([]), [(printable(name), f"Parquet file is damaged: {error}")])
        columns = parquet.schema_arrow.names
        if image_column not in columns:
            raise ValueError(
                f"{uri!r} has no column {image_column!r}: expected encoded images there. "
                f"Set shard.image_column to one of {columns}."
            )
        labels: list[Any] = [""] * parquet.metadata.num_rows
        if label_column in columns:
            labels = parquet.read(columns=[label_column]).column(0).to_pylist()
        class_names = _stated_class_names(parquet.schema_arrow, label_column)
        sizes = _group_sizes(parquet)
    table = listed(
        "parquet",
        uri,
        keys=[f"{printable(name)}/{row:08d}" for row in range(len(labels))],
        class_names=[_class_name(label, class_names) for label in labels],
        index=np.arange(len(labels)),
        member=image_column,
        unit=np.repeat(np.arange(len(sizes)), sizes),
    )
    return Listing(table, [], class_names)


def _class_name(label: Any, class_names: tuple[str, ...]) -> str:
    if isinstance(label, int) and 0 <= label < len(class_names):
        return class_names[label]
    return "" if label is None else str(label)


def _stated_class_names(schema: pa.Schema, label_column: str) -> tuple[str, ...]:
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    feature = json.loads(text).get("info", {}).get("features", {}).get(label_column, {})
    return tuple(feature.get("names", ()))


def read_parquet(candidates: Sequence[Candidate]) -> Iterator[Record]:
    """Read rows, which ascend within a file; a row group that holds wanted rows is read once.

    Memory: `BATCH_ROWS` rows and the pages of the column that hold them.
    """
    for container, rows in group_by_container(candidates):
        num_read = 0
        try:
            with open_file(container) as file:
                for record in _read_rows(pq.ParquetFile(file, buffer_size=BUFFER_BYTES), rows):
                    yield record
                    num_read += 1
        except (OSError, pa.ArrowInvalid) as error:
            yield from (Record(c, None, f"cannot be read: {error}") for c in rows[num_read:])


def _read_rows(table: pq.ParquetFile, rows: Sequence[Candidate]) -> Iterator[Record]:
    starts = np.cumsum([0, *_group_sizes(table)])
    for group, members in itertools.groupby(rows, key=lambda c: c.unit):
        wanted = {c.index - int(starts[group]): c for c in members}
        first = 0
        columns = [rows[0].member]
        for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
            for row in range(first, first + len(batch)):
                if row in wanted:
                    yield _record(wanted[row], batch.column(0)[row - first].as_py())
            first += len(batch)


def _record(candidate: Candidate, value: Any) -> Record:
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes):
        return Record(candidate, data)
    return Record(candidate, None, f"row holds no image bytes but {type(data).__name__}")


def _group_sizes(table: pq.ParquetFile) -> list[int]:
    return [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
