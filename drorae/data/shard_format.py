"""The files of a split: shards in Arrow's IPC format and one small index beside them.

`train/part-00000.arrow` holds one uncompressed record batch, so that a row lies in the file as it
is needed: pictures one after the other as files (PNG, JPEG), latents as float16 rows of one size.
`train/index.arrow` says of every row its label and, of pictures, the bytes that it takes; its
metadata says where the latents of each shard begin. So labels need no shard, a row of a remote
shard is one ranged read, and a local shard is used where it is mapped. pyarrow reads both
(`pyarrow.ipc.open_file`), `datasets` the pictures too (`load_dataset("arrow", ...)`).
"""

import base64
import functools
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from drorae.store import files
from drorae.store.files import FileEntry

PICTURE_SCHEMA = pa.schema(
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
"""Columns of a shard of pictures; `id` counts from 0 in each split, `image` is an image file."""

WRITE_BYTES = 8 * 2**20
"""Bytes of rows that are written at a time."""

METADATA_KEY = b"drorae"
"""Key of the JSON text in the index's metadata."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPart:
    """A shard that was written, as the index has to know it: 8 bytes a row."""

    name: str
    """Name in the stage output."""
    size_bytes: int
    """Length of the file."""
    sha256: str
    """Hex digest of the file."""
    labels: np.ndarray
    """Class of each row, int32."""
    sizes: np.ndarray
    """Bytes of each picture, int32; empty for latents."""
    offsets: dict[str, int]
    """Byte in the file at which the first row of a column begins."""

    @property
    def entry(self) -> FileEntry:
        """The file as a manifest names it."""
        return FileEntry(name=self.name, size_bytes=self.size_bytes, sha256=self.sha256)

    def to_json(self) -> dict[str, Any]:
        """JSON form, arrays in base64, for the result of a task."""
        return {
            "name": self.name,
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
            "labels": base64.b64encode(self.labels.astype("<i4").tobytes()).decode(),
            "sizes": base64.b64encode(self.sizes.astype("<i4").tobytes()).decode(),
            "offsets": self.offsets,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "ShardPart":
        """Part from its JSON form; further fields are ignored."""
        return cls(
            name=data["name"],
            size_bytes=data["size_bytes"],
            sha256=data["sha256"],
            labels=np.frombuffer(base64.b64decode(data["labels"]), "<i4"),
            sizes=np.frombuffer(base64.b64decode(data["sizes"]), "<i4"),
            offsets=dict(data["offsets"]),
        )


def part_name(split: str, part: int) -> str:
    """Name of a shard inside a stage output."""
    return f"{split}/part-{part:05d}.arrow"


def index_name(split: str) -> str:
    """Name of a split's index inside a stage output."""
    return f"{split}/index.arrow"


def write_picture_shard(output_uri: str, name: str, rows: pa.RecordBatch) -> ShardPart:
    """Write a shard of pictures, atomically and equal rows to equal bytes; nothing is copied.

    Args:
        output_uri: Folder of the stage output, local or s3://.
        name: Name in it, from `part_name`.
        rows: All rows of the shard with the columns of `PICTURE_SCHEMA`.

    Raises:
        ValueError: Other columns.
    """
    if rows.schema.remove_metadata() != PICTURE_SCHEMA:
        raise ValueError(
            f"rows of {name} have columns {rows.schema.names}: expected PICTURE_SCHEMA, "
            f"{PICTURE_SCHEMA.names} with its types."
        )
    image: Any = rows.column("image")
    ends = np.frombuffer(image.buffers()[1], np.int32)[image.offset :][: len(rows) + 1]
    first = image.buffers()[2].address + int(ends[0])
    labels = rows.column("label").to_numpy()
    return _write(output_uri, name, rows, labels, np.diff(ends), {"image": first})


def write_latent_shard(
    output_uri: str,
    name: str,
    latents: dict[str, np.ndarray],
    labels: np.ndarray,
    first_id: int,
    filled: Callable[[int], None] = lambda rows: None,
) -> ShardPart:
    """Write a shard of latents, atomically and equal rows to equal bytes; nothing is copied.

    The arrays may still be filled while they are written.

    Args:
        output_uri: Folder of the stage output, local or s3://.
        name: Name in it, from `part_name`.
        latents: Columns, float16 [rows, channels, height, width], all of one shape.
        labels: Class of each row.
        first_id: Id of the first row.
        filled: Returns once so many rows of all columns are there; raises to give up.

    Raises:
        ValueError: Arrays of another number format, or of different shapes.
    """
    kinds = {(column.dtype, column.shape) for column in latents.values()}
    if len(kinds) != 1 or kinds != {(np.dtype(np.float16), (len(labels), *_row_shape(latents)))}:
        raise ValueError(
            f"latents of {name} are {sorted(map(str, kinds))} for {len(labels)} labels: expected "
            "float16 [rows, channels, height, width], one shape for all columns."
        )
    values = {column: np.ascontiguousarray(array) for column, array in latents.items()}
    columns: dict[str, Any] = {
        "id": pa.array(np.arange(first_id, first_id + len(labels)), pa.int64()),
        "label": pa.array(labels, pa.int32()),
    }
    for column, array in values.items():
        columns[column] = _as_lists(array)
    addresses = {column: array.ctypes.data for column, array in values.items()}
    batch = pa.record_batch(columns)
    row_bytes = next(iter(values.values()))[0].nbytes
    return _write(
        output_uri,
        name,
        batch,
        labels,
        np.empty(0, np.int32),
        addresses,
        lambda end: filled(-(-end // row_bytes)),
    )


def _row_shape(latents: dict[str, np.ndarray]) -> tuple[int, ...]:
    return next(iter(latents.values())).shape[1:]


def _as_lists(rows: np.ndarray) -> pa.Array:
    column: Any = pa.array(rows.reshape(-1))
    for length in reversed(rows.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, length)
    return column


def _write(
    output_uri: str,
    name: str,
    batch: pa.RecordBatch,
    labels: np.ndarray,
    sizes: np.ndarray,
    addresses: dict[str, int],
    ready: Callable[[int], None] = lambda end: None,
) -> ShardPart:
    written: dict[int, int] = {}

    def save(file: BinaryIO) -> None:
        sink = _Places(file, set(addresses.values()), ready)
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        written.update(sink.places)

    entry = files.write_with(files.join(output_uri, name), save)
    return ShardPart(
        name=name,
        size_bytes=entry.size_bytes,
        sha256=entry.sha256,
        labels=np.asarray(labels, np.int32),
        sizes=np.asarray(sizes, np.int32),
        offsets={column: written[address] for column, address in addresses.items()},
    )


class _Places(io.RawIOBase):
    """Passes bytes on and notes at which byte of the file each of some buffers was written.

    Args:
        target: Where to write.
        addresses: Where in memory those buffers begin.
        ready: Returns once a buffer has its bytes up to the given one.
    """

    def __init__(self, target: BinaryIO, addresses: set[int], ready: Callable[[int], None]) -> None:
        self._target, self._addresses, self._ready = target, addresses, ready
        self._position = 0
        self.places: dict[int, int] = {}

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if isinstance(data, pa.Buffer) and data.address in self._addresses:
            self.places[data.address] = self._position
            for start in range(0, len(view), WRITE_BYTES):
                end = min(start + WRITE_BYTES, len(view))
                self._ready(end)
                self._target.write(view[start:end])
        else:
            self._target.write(view)
        self._position += len(view)
        return len(view)


def write_index(output_uri: str, split: str, parts: Sequence[ShardPart]) -> FileEntry:
    """Write the index of a split's shards, in their order; grows by 16 bytes a row.

    Returns:
        The entry, named relative to the stage output.
    """
    columns = {"label": _joined([part.labels for part in parts], np.int32)}
    if any(len(part.sizes) for part in parts):
        starts = [np.cumsum(part.sizes, dtype=np.int64) - part.sizes for part in parts]
        moved = [s + p.offsets["image"] for s, p in zip(starts, parts, strict=True)]
        columns["start"] = _joined(moved, np.int64)
        columns["size"] = _joined([part.sizes for part in parts], np.int32)
    shards = [{"rows": len(part.labels), "offsets": part.offsets} for part in parts]
    batch = pa.record_batch({name: pa.array(values) for name, values in columns.items()})
    text = json.dumps({"shards": shards}, sort_keys=True)
    batch = batch.replace_schema_metadata({METADATA_KEY: text.encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    name = index_name(split)
    entry = files.write_bytes(files.join(output_uri, name), sink.getvalue().to_pybytes())
    return FileEntry(name=name, size_bytes=entry.size_bytes, sha256=entry.sha256)


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype)


@dataclass(frozen=True, kw_only=True)
class Index:
    """Where every row of a split lies. Holds up to 20 bytes a row."""

    labels: np.ndarray
    """Class of each row, int64."""
    shard_rows: tuple[int, ...]
    """Rows of each shard."""
    offsets: tuple[dict[str, int], ...]
    """For each shard the byte at which the first row of a column begins."""
    starts: np.ndarray
    """Byte in its shard at which each picture begins, int64; empty for latents."""
    sizes: np.ndarray
    """Bytes of each picture, int32; empty for latents."""

    @functools.cached_property
    def first_rows(self) -> np.ndarray:
        """First row of each shard, and the number of rows at the end; int64 [shards + 1]."""
        return np.cumsum([0, *self.shard_rows], dtype=np.int64)

    def shards_of(self, rows: np.ndarray) -> np.ndarray:
        """Number of the shard of each row.

        Raises:
            IndexError: A row outside of the split.
        """
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self.labels):
            raise IndexError(
                f"ids {int(rows.min())} to {int(rows.max())} are out of range: "
                f"there are {len(self.labels)} rows."
            )
        return np.searchsorted(self.first_rows, rows, side="right") - 1


def parse_index(data: bytes) -> Index:
    """Index from the content of its file.

    Raises:
        ValueError: It is no index.
    """
    try:
        batch = pa.ipc.open_file(pa.BufferReader(data)).get_batch(0)
        shards = json.loads(batch.schema.metadata[METADATA_KEY])["shards"]
    except (pa.ArrowInvalid, KeyError, TypeError) as error:
        raise ValueError(
            f"{len(data)} bytes are no index of shards ({error!r}): expected index.arrow as this "
            "version writes it; build the stage again."
        ) from error
    columns = {name: batch.column(name).to_numpy() for name in batch.schema.names}
    return Index(
        labels=columns["label"].astype(np.int64),
        shard_rows=tuple(shard["rows"] for shard in shards),
        offsets=tuple(shard["offsets"] for shard in shards),
        starts=columns.get("start", np.empty(0, np.int64)),
        sizes=columns.get("size", np.empty(0, np.int32)),
    )
