"""The Parquet files of the shard stage and the two workers that write them.

`DecodeChunk` reads, checks and squares a chunk of candidates once and keeps the pictures in a work
file; `WriteShard` then collects the rows of one shard, which lie scattered over those files because
shards are in hash order. Small row groups keep the bytes read per wanted row low.
"""

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from drorae.data.decoding import (
    BadImage,
    Crop,
    ImageLimits,
    decode_image,
    encode_png,
    shrink_to_view,
    to_square,
)
from drorae.data.readers.candidates import Candidate, Record
from drorae.data.readers.filesystem import open_file
from drorae.data.readers.source import read_records
from drorae.data.shard_map import ShardTask
from drorae.store import files

SCHEMA = pa.schema(
    {
        "id": pa.int64(),
        "key": pa.string(),
        "label": pa.int32(),
        "image": pa.binary(),
        "source_sha256": pa.string(),
        "source_width": pa.int32(),
        "source_height": pa.int32(),
    }
)
"""Columns of a shard; `id` counts from 0 in each split, `image` is an 8-bit RGB PNG."""

VIEW_SCHEMA = SCHEMA.append(pa.field("image_view", pa.binary()))
"""Columns of a training shard for random crops: `image_view` is the whole picture, its shorter side
at most `ShardJob.view_px` (bytes: see there)."""

CHUNK_ROW_GROUP = 16
"""Rows of a row group in work files: the least that is read for one wanted row."""

SHARD_ROW_GROUP = 256
"""Rows of a row group in shards."""


def part_name(split: str, part: int) -> str:
    """Name of a shard inside the stage output."""
    return f"{split}/part-{part:05d}.parquet"


def table_bytes(table: pa.Table, row_group: int) -> bytes:
    """Serialise a table, equal tables to equal bytes; no codec, as PNG compresses no further."""
    buffer = pa.BufferOutputStream()
    pq.write_table(
        table, buffer, compression="none", use_dictionary=False, row_group_size=row_group
    )
    return buffer.getvalue().to_pybytes()


class DecodeChunk:
    """Decode candidates to square PNGs in one work file; bad ones become (key, reason).

    Args:
        chunks_uri: Folder of the work files.
        side_px: Side of the squares.
        crop: How a picture becomes square.
        limits: What is refused.
        view_px: Shorter side of the second copy for random crops; none: no copy.
    """

    def __init__(
        self,
        chunks_uri: str,
        side_px: int,
        crop: Crop,
        limits: ImageLimits,
        view_px: int | None = None,
    ) -> None:
        self._chunks_uri = chunks_uri
        self._side_px = side_px
        self._crop: Crop = crop
        self._limits = limits
        self._view_px = view_px

    def __call__(self, task: ShardTask) -> dict[str, Any]:
        """Result: accepted [[key, sha256]] in row order, rejected [[key, reason]]."""
        candidates = [Candidate(*row) for row in task.payload["candidates"]]
        rows: list[dict[str, Any]] = []
        rejected: list[tuple[str, str]] = []
        for record in read_records(candidates):
            try:
                rows.append(self._picture(record))
            except BadImage as reason:
                rejected.append((record.candidate.key, str(reason)))
        # The order of the shards: neighbours in a shard are then neighbours here, one read fetches
        # several.
        rank = {key: i for i, key in enumerate(task.payload["order"])}
        rows.sort(key=lambda row: rank[row["key"]])
        uri = files.join(self._chunks_uri, f"{task.name}.parquet")
        full = SCHEMA if self._view_px is None else VIEW_SCHEMA
        schema = pa.schema([field for field in full if field.name not in ("id", "label")])
        table = pa.Table.from_pylist(rows, schema=schema)
        files.write_bytes(uri, table_bytes(table, CHUNK_ROW_GROUP))
        accepted = [(row["key"], row["source_sha256"]) for row in rows]
        return {"chunk": task.name, "accepted": accepted, "rejected": rejected}

    def _picture(self, record: Record) -> dict[str, Any]:
        if record.data is None:
            raise BadImage(record.error)
        image = decode_image(record.data, self._limits)
        view: dict[str, Any] = {}
        if self._view_px is not None:
            view["image_view"] = encode_png(shrink_to_view(image, self._view_px))
        return view | {
            "key": record.candidate.key,
            "image": encode_png(to_square(image, self._side_px, self._crop)),
            "source_sha256": content_digest(record.data),
            "source_width": image.width,
            "source_height": image.height,
        }


def content_digest(data: bytes | np.ndarray) -> str:
    """Sha256 (hex) of a file's bytes, or of pixels."""
    return hashlib.sha256(data if isinstance(data, bytes) else data.tobytes()).hexdigest()


class WriteShard:
    """Collect the rows of one shard from the work files and write it.

    Args:
        chunks_uri: Folder of the work files.
        output_uri: Folder of the stage output.
        with_view: Whether the shard holds the copies for random crops.
    """

    def __init__(self, chunks_uri: str, output_uri: str, with_view: bool = False) -> None:
        self._chunks_uri = chunks_uri
        self._output_uri = output_uri
        self._schema = VIEW_SCHEMA if with_view else SCHEMA

    def __call__(self, task: ShardTask) -> dict[str, Any]:
        """Payload: name, first_id, rows [[chunk, row, label]]; result: an entry with its rows."""
        wanted: list[tuple[str, int, int]] = [(c, r, label) for c, r, label in task.payload["rows"]]
        pictures: list[pa.Table] = []
        position: dict[tuple[str, int], int] = {}
        for chunk, rows in _rows_by_chunk(wanted).items():
            uri = files.join(self._chunks_uri, f"{chunk}.parquet")
            start = len(position)
            position |= {(chunk, row): start + i for i, row in enumerate(rows)}
            pictures.append(read_rows(uri, rows, self._schema.names))
        table = pa.concat_tables(pictures).take([position[c, r] for c, r, _ in wanted])
        first = int(task.payload["first_id"])
        table = table.append_column("id", pa.array(range(first, first + len(wanted)), pa.int64()))
        table = table.append_column("label", pa.array([x[2] for x in wanted], pa.int32()))
        table = table.select(self._schema.names).cast(self._schema).combine_chunks()
        name = str(task.payload["name"])
        data = table_bytes(table, SHARD_ROW_GROUP)
        entry = files.write_bytes(files.join(self._output_uri, name), data)
        size = {"size_bytes": entry.size_bytes, "sha256": entry.sha256}
        return {"name": name, "rows": len(wanted), **size}


def _rows_by_chunk(wanted: Sequence[tuple[str, int, int]]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = defaultdict(list)
    for chunk, row, _ in wanted:
        rows[chunk].append(row)
    return {chunk: sorted(rows[chunk]) for chunk in sorted(rows)}


def read_rows(uri: str, rows: Sequence[int], names: Sequence[str]) -> pa.Table:
    """Chosen rows (ascending) and columns (absent ones ignored) of a Parquet file.

    Only their row groups are read.
    """
    with open_file(uri) as file:
        parquet = pq.ParquetFile(file)
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        starts = np.array([0, *itertools.accumulate(sizes)])
        group_of = np.searchsorted(starts, np.asarray(rows), side="right") - 1
        groups = sorted(set(group_of.tolist()))
        table = parquet.read_row_groups(groups, columns=list(names))
        loaded_start = dict(
            zip(groups, [0, *itertools.accumulate(sizes[g] for g in groups)], strict=False)
        )
        take = [
            loaded_start[g] + row - starts[g]
            for g, row in zip(group_of.tolist(), rows, strict=True)
        ]
        return table.take(pa.array(take, pa.int64()))
