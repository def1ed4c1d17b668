"""Parquet tables with an image column (bytes, or a struct with `bytes`) and a label column.

Rows are read a row group at a time, because a single row cannot be read on its own. Damage is
limited to the row group in which it lies. What labels mean is in `parquet_labels`.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from drorae.data.readers.candidates import (
    Candidate,
    Listing,
    Note,
    ReadRule,
    Record,
    group_by_container,
    joined,
    listed,
    printable,
)
from drorae.data.readers.damage import is_damage, reason_of
from drorae.data.readers.filesystem import open_file
from drorae.data.readers.parquet_labels import (
    INDEX_COLUMN,
    Labels,
    column_of,
    field_of,
    group_labels,
    may_be_labels,
    partition_label,
    stated_class_names,
)

BATCH_ROWS, BATCH_BYTES = 64, 256 << 20
"""Rows decoded at a time, and about the most bytes of them."""

BUFFER_BYTES = 4 << 20
"""Bytes of a column that one request reads."""

IMAGE_IS_PATH = "image is a path, not bytes: store the files themselves in the table"


def list_parquet(uri: str, name: str, rule: ReadRule) -> Listing:
    """List the rows of one Parquet file.

    Args:
        uri: The Parquet file.
        name: Its name inside the source; keys start with it.
        rule: Column of encoded images, and column of class names or numbers.

    Returns:
        Rows with their label; rows of a damaged row group are rejects. `class_names` are those of
        the file alone; without them a number is the name of its class.

    Raises:
        ValueError: A column is missing; the columns that exist are named.
        RuntimeError: An object store refused or did not answer.
    """
    groups: list[Labels] = []
    try:
        with open_file(uri) as file:
            parquet = _opened(file)
            schema = parquet.schema_arrow
            sizes = _group_sizes(parquet)
            label_column = _label_column(schema, rule)
            class_names = stated_class_names(schema, rule.label_column or "")
            partition = None
            if label_column is None and rule.label_column is not None:
                partition = partition_label(name, rule.label_column, class_names)
            problem = _column_problem(uri, schema, rule, has_partition=partition is not None)
            for group, num_rows in enumerate(sizes if not problem else ()):
                if label_column is None:
                    groups.append(Labels([partition or ""] * num_rows))
                else:
                    groups.append(_labels(parquet, uri, group, label_column, class_names))
    except Exception as error:
        if not is_damage(error, uri):
            raise
        reason = f"Parquet file is damaged: {reason_of(error)}"
        return Listing(joined([]), [(printable(name), reason)])
    if problem:
        raise ValueError(problem)
    table, rejects = _rows(uri, name, rule.image_column, groups)
    is_stated = label_column is not None or partition is not None
    return Listing(
        table,
        rejects,
        class_names if is_stated else (),
        notes=tuple(_notes(rule, schema.names, label_column, partition, class_names)),
        has_stated_labels=is_stated,
    )


def _opened(file: Any) -> pq.ParquetFile:
    return pq.ParquetFile(file, buffer_size=BUFFER_BYTES, page_checksum_verification=True)


def _base(uri: str) -> str:
    """Name of a file without the place, which differs between machines."""
    return printable(uri.rpartition("/")[2])


def _column_problem(uri: str, schema: pa.Schema, rule: ReadRule, *, has_partition: bool) -> str:
    """What is wrong with the names of columns; empty if nothing is."""
    columns = [printable(name) for name in schema.names]
    if field_of(schema, rule.image_column) is None:
        return (
            f"{uri!r} has no column {rule.image_column!r}: expected encoded images there. "
            f"Set shard.image_column to one of {columns}."
        )
    for name in (rule.image_column, rule.label_column):
        if schema.names.count(name or "") > 1:
            return f"{uri!r} has several columns {name!r}: expected one. Rename the others."
    candidates = may_be_labels(schema, rule.image_column)
    has_labels = has_partition or field_of(schema, rule.label_column or "") is not None
    if rule.label_column is None or has_labels or not candidates:
        return ""
    return (
        f"{uri!r} has no column {rule.label_column!r}: expected labels there. Set "
        f"shard.label_column to one of {candidates}, or to null if the images have no labels."
    )


def _label_column(schema: pa.Schema, rule: ReadRule) -> str | None:
    name = rule.label_column
    return name if name is not None and field_of(schema, name) is not None else None


def _notes(
    rule: ReadRule,
    columns: Sequence[str],
    label_column: str | None,
    partition: str | None,
    class_names: Sequence[str],
) -> Iterator[Note]:
    """What was decided about the labels of a file."""
    if label_column is not None:
        counted = f", numbers of the {len(class_names)} class names of the file"
        yield Note(f"labels are column {label_column!r}{counted if class_names else ''}")
    elif partition is not None:
        yield Note(f"labels are the folders '{rule.label_column}=...' of the tables", True)
    elif rule.label_column is not None:
        text = f"there is no column {rule.label_column!r} and none that could hold labels"
        others = [name for name in columns if name not in (rule.image_column, INDEX_COLUMN)]
        if others:
            text += f" (it has {printable(', '.join(others))})"
        yield Note(
            f"{text}, so images have none; shard.label_column names it", is_doubtful=bool(others)
        )


def _labels(
    parquet: pq.ParquetFile,
    uri: str,
    group: int,
    column: str,
    class_names: Sequence[str],
) -> Labels:
    """Labels of a row group; where they cannot be read, a reason for every row."""
    num_rows = parquet.metadata.row_group(group).num_rows
    try:
        labels = group_labels(parquet, group, column, class_names)
        reason = f"holds {len(labels.texts)} labels for {num_rows} rows"
        if len(labels.texts) == num_rows:
            bad = {row: f"has no label: {why}" for row, why in labels.bad.items()}
            return Labels(labels.texts, bad)
    except Exception as error:
        if not is_damage(error, uri):
            raise
        reason = f"has labels that cannot be read: {reason_of(error)}"
    reason = f"row group {group} of {_base(uri)} {reason}"
    return Labels([""] * num_rows, dict.fromkeys(range(num_rows), reason))


def _rows(
    uri: str, name: str, image_column: str, groups: Sequence[Labels]
) -> tuple[pa.Table, list[tuple[str, str]]]:
    sizes = [len(labels.texts) for labels in groups]
    starts = np.cumsum([0, *sizes])
    key = f"{printable(name)}/{{:08d}}"
    bad = {
        int(start) + row: reason
        for start, labels in zip(starts, groups, strict=False)
        for row, reason in labels.bad.items()
    }
    is_good = np.ones(int(starts[-1]), bool)
    is_good[list(bad)] = False
    rows = np.flatnonzero(is_good)
    texts = list(itertools.chain.from_iterable(labels.texts for labels in groups))
    table = listed(
        "parquet",
        uri,
        keys=[key.format(row) for row in rows.tolist()],
        class_names=[texts[row] for row in rows.tolist()],
        index=rows,
        member=image_column,
        unit=np.repeat(np.arange(len(sizes)), sizes)[rows],
    )
    return table, [(key.format(row), reason) for row, reason in bad.items()]


def read_parquet(candidates: Sequence[Candidate]) -> Iterator[Record]:
    """Read rows, which ascend within a file; a row group that holds wanted rows is read once.

    Memory: a batch of rows and the pages of the column that hold them.

    Raises:
        RuntimeError: An object store refused or did not answer.
    """
    for container, rows in group_by_container(candidates):
        yield from _until_damage(container, rows, "rows", _read_file(container, rows))


def _until_damage(
    container: str, rows: Sequence[Candidate], what: str, records: Iterator[Record]
) -> Iterator[Record]:
    """Records of rows; behind damage, an error for each row that is left."""
    num_read = 0
    reason = "row is not there"
    try:
        for record in records:
            yield record
            num_read += 1
    except Exception as error:
        if not is_damage(error, container):
            raise
        reason = reason_of(error)
    yield from (
        Record(row, None, f"cannot be read: {what} of {_base(container)}: {reason}")
        for row in rows[num_read:]
    )


def _read_file(container: str, rows: Sequence[Candidate]) -> Iterator[Record]:
    with open_file(container) as file:
        parquet = _opened(file)
        starts = np.cumsum([0, *_group_sizes(parquet)])
        for group, members in itertools.groupby(rows, key=lambda c: c.unit):
            wanted = list(members)
            records = _read_group(parquet, group, int(starts[group]), wanted)
            yield from _until_damage(container, wanted, f"row group {group}", records)


def _read_group(
    parquet: pq.ParquetFile, group: int, start: int, rows: Sequence[Candidate]
) -> Iterator[Record]:
    wanted = {row.index - start: row for row in rows}
    column = rows[0].member
    batch_rows = _batch_rows(parquet, group)
    first = 0
    for batch in parquet.iter_batches(batch_rows, row_groups=[group], columns=[column]):
        images = column_of(batch, column)
        for row in range(first, first + len(batch)):
            if row in wanted:
                yield _record(wanted[row], images[row - first])
        first += len(batch)


def _batch_rows(parquet: pq.ParquetFile, group: int) -> int:
    """Rows to decode at a time: fewer where images are large."""
    # Not the sizes of the column: pyarrow 25 ends the process where that part is damaged.
    info = parquet.metadata.row_group(group)
    return max(1, min(BATCH_ROWS, BATCH_BYTES * info.num_rows // max(info.total_byte_size, 1)))


def _record(candidate: Candidate, image: Any) -> Record:
    try:
        value = _value(image)
    except (ValueError, pa.ArrowException) as error:
        return Record(candidate, None, f"cannot be read: {reason_of(error)}")
    if isinstance(value, bytes):
        return Record(candidate, value)
    if isinstance(value, dict) and value.get("path"):
        return Record(candidate, None, IMAGE_IS_PATH)
    data = value.get("bytes") if isinstance(value, dict) else value
    return Record(candidate, None, f"row holds no image bytes but {type(data).__name__}")


def _value(image: Any) -> Any:
    """Content of a cell as bytes if it holds any; lists of bytes too."""
    if isinstance(image, pa.StructScalar) and "bytes" in image:
        content = _value(image["bytes"])
        return content if isinstance(content, bytes) else image.as_py()
    if isinstance(image, pa.ListScalar) and image.type.value_type == pa.uint8() and image.is_valid:
        if image.values.null_count:
            raise ValueError("a list with gaps")
        return image.values.to_numpy().tobytes()
    return image.as_py()


def _group_sizes(parquet: pq.ParquetFile) -> list[int]:
    """Rows of each row group.

    Raises:
        ValueError: They are not those of the file.
    """
    metadata = parquet.metadata
    sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    if min(sizes, default=0) < 0 or sum(sizes) != metadata.num_rows:
        raise ValueError(f"{metadata.num_rows} rows, but row groups of {sizes[:5]}")
    return sizes
