"""The label column of a Parquet file: which it is, its class names, the label of each row.

Class names are those of a Hugging Face `ClassLabel`, from the metadata of the file; each file's
numbers count its own names. Columns of text or of pyarrow's dictionary type name their classes.
"""

import json
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from drorae.data.readers.labels import BadLabel, cell_label, decoded, label_text

LABEL_BATCH_ROWS = 65_536
"""Labels read at a time."""

INDEX_COLUMN = "__index_level_0__"
"""What pandas adds; never a label."""


NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"
"""Value of a partition of rows without one."""


@dataclass(slots=True)
class Labels:
    """Labels of the rows of one row group."""

    texts: list[str] = field(default_factory=list)
    """Class name of each row, empty if none is stated."""
    bad: dict[int, str] = field(default_factory=dict)
    """Rows whose label is none, and why."""


def field_of(schema: pa.Schema, name: str) -> pa.Field | None:
    """The field of a column; a name with dots may lead into structs. None if there is none."""
    if name in schema.names:
        return schema.field(schema.names.index(name))
    first, *rest = name.split(".")
    if not rest or first not in schema.names:
        return None
    found = schema.field(schema.names.index(first))
    for part in rest:
        place = found.type.get_field_index(part) if pa.types.is_struct(found.type) else -1
        if place < 0:
            return None
        found = found.type.field(place)
    return found


def column_of(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A column of a batch, or of the structs in it."""
    functions: Any = pyarrow.compute
    if name in batch.schema.names:
        return batch.column(batch.schema.names.index(name))
    first, *rest = name.split(".")
    column = batch.column(batch.schema.names.index(first))
    for part in rest:
        column = functions.struct_field(column, part)
    return column


def may_be_labels(schema: pa.Schema, image_column: str) -> list[str]:
    """Columns that could hold labels by their type."""
    skipped = (image_column.split(".")[0], image_column, INDEX_COLUMN)
    return [f.name for f in schema if f.name not in skipped and _may_be_label(f.type)]


def _may_be_label(kind: pa.DataType) -> bool:
    types = pa.types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return is_text or types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)


def stated_class_names(schema: pa.Schema, label_column: str) -> tuple[str, ...]:
    """Names of a `ClassLabel` column in label order; empty if the metadata has none.

    Two classes of one name stay apart: the later one is called `NAME (NUMBER)`.
    """
    try:
        found: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        found = found["info"]["features"]
        path = [label_column] if label_column in found else label_column.split(".")
        for key in path:
            found = found[key]
        names = found["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return ()
    unique: dict[str, None] = {}
    for number, name in enumerate(names):
        text = label_text(name)
        unique[text if text and text not in unique else f"{text} ({number})".strip()] = None
    return tuple(unique) if len(unique) == len(names) else ()


def group_labels(
    parquet: pq.ParquetFile, group: int, column: str, class_names: Sequence[str]
) -> Labels:
    """Labels of the rows of a row group; nothing but their column is read.

    Raises:
        Exception: Whatever pyarrow makes of damage.
    """
    labels = Labels()
    batches = parquet.iter_batches(LABEL_BATCH_ROWS, row_groups=[group], columns=[column])
    for batch in batches:
        _add(column_of(batch, column), class_names, labels)
    return labels


def partition_label(name: str, column: str, class_names: Sequence[str]) -> str | None:
    """Label that a folder states, as Spark and Arrow write partitions: `label=cat/part-0.parquet`.

    Args:
        name: Name of the file inside the source.
        column: The label column.
        class_names: What numbers count, if anything.

    Returns:
        The class name, "" for Spark's folder of missing values; None if no folder states one.
    """
    value = next(
        (part.partition("=")[2] for part in name.split("/")[:-1] if part.startswith(f"{column}=")),
        None,
    )
    if value is None or value == NO_PARTITION:
        return value and ""
    text = cell_label(unquote(value))
    return _text(int(text), class_names) if class_names and text.isdecimal() else text


def _add(array: Any, class_names: Sequence[str], labels: Labels) -> None:
    first = len(labels.texts)
    codes, values = _coded(array)
    texts = [_text_or_reason(value, class_names) for value in values]
    reasons = [reason for _, reason in texts]
    labels.texts += [texts[code][0] for code in codes]
    if any(reasons):
        labels.bad |= {
            first + row: reasons[code] for row, code in enumerate(codes) if reasons[code]
        }


def _coded(array: Any) -> tuple[list[int], list[Any]]:
    """Number of the value of each row, and the values; each value once, if they can be compared."""
    types = pa.types
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if types.is_nested(array.type) or types.is_null(array.type):
        return list(range(len(array))), array.to_pylist()
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if types.is_string(array.type) or types.is_large_string(array.type):
        array = array.view(pa.binary() if types.is_string(array.type) else pa.large_binary())
    if types.is_float16(array.type):  # which Arrow does not compare
        array = array.cast(pa.float32())
    coded = array.dictionary_encode()
    codes = coded.indices.fill_null(len(coded.dictionary)).to_numpy().astype(np.int64)
    return codes.tolist(), [*coded.dictionary.to_pylist(), None]


def _text_or_reason(value: Any, class_names: Sequence[str]) -> tuple[str, str]:
    try:
        return _text(value, class_names), ""
    except BadLabel as reason:
        return "", str(reason)


def _text(value: Any, class_names: Sequence[str]) -> str:
    if isinstance(value, bytes):
        return cell_label(decoded(value))
    if isinstance(value, str):
        return cell_label(value)
    if isinstance(value, Decimal):
        value = int(value) if value == value.to_integral_value() else float(value)
    text = label_text(value)
    if not class_names or not text or not isinstance(value, numbers.Real):
        return text
    if int(text) >= len(class_names):
        raise BadLabel(f"label {text} is none of the {len(class_names)} classes of the file")
    return class_names[int(text)]
