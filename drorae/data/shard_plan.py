"""Tables that many tasks share: one work file, of which each task reads its rows alone.

So a task that names thousands of images weighs some hundred bytes in the driver and in Ray, and the
driver holds the text of one task at a time.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import pyarrow as pa

from drorae.data.shard_map import ShardTask
from drorae.store import files


def plan_tasks(
    uri: str, prefix: str, tables: Callable[[], Iterable[tuple[pa.Table, dict[str, Any]]]]
) -> list[ShardTask]:
    """Write a table for each task into one file, and name the tasks after their content.

    A marker of an earlier attempt therefore never stands for other rows. The size of a task is its
    number of rows.

    Args:
        uri: The file.
        prefix: How the names begin.
        tables: Gives the table and further JSON values of each task; called again after an outage.
    """
    tasks: list[ShardTask] = []

    def save(file: BinaryIO) -> None:
        tasks.clear()
        start = 0
        for number, (table, values) in enumerate(tables()):
            data = _as_bytes(table)
            digest = hashlib.sha256(data + repr(sorted(values.items())).encode()).hexdigest()
            place = {"plan": uri, "start": start, "end": start + len(data)}
            name = f"{prefix}-{number:05d}-{digest[:20]}"
            tasks.append(ShardTask(name, {**place, **values}, size=len(table)))
            file.write(data)
            start += len(data)

    files.write_with(uri, save)
    return tasks


def read_plan(task: ShardTask) -> pa.Table:
    """The rows of a task: one request."""
    plan, start, end = (task.payload[name] for name in ("plan", "start", "end"))
    with pa.ipc.open_stream(files.read_range(plan, start, end)) as reader:
        return reader.read_all()


def _as_bytes(table: pa.Table) -> bytes:
    """A stream of one batch without dictionaries, which would name all containers in each task."""
    plain = [
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
        for field in table.schema
    ]
    table = table.cast(pa.schema(plain)).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()
