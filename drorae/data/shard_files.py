"""The two workers of the shard stage: one checks pictures, the other writes shards of them.

`CheckPictures` reads candidates where they lie next to each other and decodes each one once. What a
shard is to hold and its source cannot give by range (squares, members of compressed containers,
pixel arrays) goes into packs, work files of pictures one after the other. `WriteShard` collects the
pictures of one shard by range from packs and sources; it decodes nothing. A picture is thus read
twice, and written once or, with a pack, twice.
"""

import base64
import errno
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from drorae.data.decoding import (
    BadImage,
    Crop,
    ImageLimits,
    decode_image,
    encode_png,
    to_square,
)
from drorae.data.readers.candidates import (
    LISTING_SCHEMA,
    Candidate,
    Record,
    file_name,
    to_candidates,
)
from drorae.data.readers.folder import file_span
from drorae.data.readers.ranges import Span, read_spans
from drorae.data.readers.source import read_records
from drorae.data.readers.tar import tar_span
from drorae.data.shard_format import PICTURE_SCHEMA, write_picture_shard
from drorae.data.shard_map import ShardTask
from drorae.data.shard_plan import read_plan
from drorae.failure import Fatal
from drorae.store import files

MAX_FILE_BYTES = (1 << 31) - 1
"""Largest file of one picture; a column of a shard counts its bytes in 31 bits."""
PACK_BYTES = 64 << 20
"""Pictures that a worker holds until it writes them as one pack."""

CHECKED_SCHEMA = pa.schema(
    {
        "position": pa.int64(),
        "sha256": pa.binary(32),
        "width": pa.int32(),
        "height": pa.int32(),
        "pack": pa.int32(),
        "start": pa.int64(),
        "size_bytes": pa.int64(),
        "reason": pa.string(),
    }
)
"""What checking a candidate gave: digest of its content, size in pixels, number of the task's pack
that holds the picture (-1: the source does) with its bytes there, or why it is rejected."""

SHARD_PLAN_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "label": pa.int32(),
        "uri": pa.binary(),
        "start": pa.int64(),
        "size_bytes": pa.int64(),
        "is_source": pa.bool_(),
        "sha256": pa.binary(32),
        "width": pa.int32(),
        "height": pa.int32(),
    }
)
"""Rows of a shard that is to be written: where each picture lies, and what is known of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureRule:
    """What of a source image a shard keeps."""

    pictures: Literal["square", "source"]
    """As `ShardJob.pictures`."""
    side_px: int
    """Side of the squares."""
    crop: Crop
    """How a picture becomes square."""
    limits: ImageLimits
    """What is refused."""


class CheckPictures:
    """Decode candidates and say of each one what a shard needs to know.

    Memory: 16 reads and one pack, whatever the number of candidates.

    Args:
        packs_uri: Folder of the packs.
        rule: What is kept.
    """

    def __init__(self, packs_uri: str, rule: PictureRule) -> None:
        self._packs_uri, self._rule = packs_uri, rule

    def __call__(self, task: ShardTask) -> dict[str, Any]:
        """Plan: a listing with `position` and `rank` in hash order; result: see `read_checked`."""
        plan = read_plan(task)
        candidates = to_candidates(plan.select(LISTING_SCHEMA.names))
        packs = _Packs(files.join(self._packs_uri, task.name), plan["rank"].to_numpy())
        rows = []
        for number, record in enumerate(read_records(candidates)):
            try:
                rows.append(self._check(record, number, packs))
            except BadImage as reason:
                rows.append({"reason": str(reason)})
        packs.write()
        for number, (row, position) in enumerate(zip(rows, plan["position"], strict=True)):
            row |= {"position": position.as_py(), **packs.places.get(number, {})}
        return {"checked": _as_text(pa.Table.from_pylist(rows, schema=CHECKED_SCHEMA))}

    def _check(self, record: Record, number: int, packs: "_Packs") -> dict[str, Any]:
        data = record.data
        if data is None:
            raise BadImage(record.error)
        if isinstance(data, bytes) and len(data) > MAX_FILE_BYTES:
            raise BadImage(f"file of {len(data)} bytes is larger than {MAX_FILE_BYTES}")
        image = decode_image(data, self._rule.limits)
        span = source_span(record.candidate)
        row = {
            "sha256": content_digest(data),
            "width": image.width,
            "height": image.height,
            "reason": "",
        }
        if self._rule.pictures == "source" and span and isinstance(data, bytes):
            return {**row, "pack": -1, "start": span.start, "size_bytes": len(data)}
        packs.add(number, self._kept(data, image))
        return row

    def _kept(self, data: bytes | np.ndarray, image: Image.Image) -> bytes:
        if self._rule.pictures == "square":
            return encode_png(to_square(image, self._rule.side_px, self._rule.crop))
        return data if isinstance(data, bytes) else encode_png(image)


def content_digest(data: bytes | np.ndarray) -> bytes:
    """Sha256 of a file's bytes, or of pixels."""
    return hashlib.sha256(data if isinstance(data, bytes) else data.tobytes()).digest()


def source_span(candidate: Candidate) -> Span | None:
    """Where the file of an image lies byte for byte; none if its container compresses."""
    spans = {"file": file_span, "tar": tar_span}
    return spans[candidate.kind](candidate) if candidate.kind in spans else None


def _as_text(table: pa.Table) -> str:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return base64.b64encode(sink.getvalue()).decode()


def read_checked(result: dict[str, Any]) -> pa.Table:
    """Table of `CHECKED_SCHEMA` from the result of a task: about 80 bytes a candidate."""
    with pa.ipc.open_stream(base64.b64decode(result["checked"])) as reader:
        return reader.read_all()


def pack_uri(packs_uri: str, task_name: str, pack: int) -> str:
    """Address of a pack of a task."""
    return f"{files.join(packs_uri, task_name)}-{pack}.bin"


class _Packs:
    """Pictures in hash order, as shards ask for them: neighbours are read in one request."""

    def __init__(self, prefix: str, ranks: np.ndarray) -> None:
        self.places: dict[int, dict[str, int]] = {}
        self._prefix, self._ranks = prefix, ranks
        self._waiting: dict[int, bytes] = {}
        self._waiting_bytes = self._num_packs = 0

    def add(self, number: int, data: bytes) -> None:
        self._waiting[number] = data
        self._waiting_bytes += len(data)
        if self._waiting_bytes >= PACK_BYTES:
            self.write()

    def write(self) -> None:
        if not self._waiting:
            return
        start = 0
        numbers = sorted(self._waiting, key=lambda number: self._ranks[number])
        for number in numbers:
            size_bytes = len(self._waiting[number])
            place = {"pack": self._num_packs, "start": start, "size_bytes": size_bytes}
            self.places[number] = place
            start += size_bytes
        folder, _, name = self._prefix.rpartition("/")
        content = b"".join(self._waiting[number] for number in numbers)
        files.write_bytes(pack_uri(folder, name, self._num_packs), content)
        self._waiting, self._waiting_bytes = {}, 0
        self._num_packs += 1


class WriteShard:
    """Collect the pictures of one shard and write it.

    Memory: the shard once, and 16 reads.

    Args:
        output_uri: Folder of the stage output.
    """

    def __init__(self, output_uri: str) -> None:
        self._output_uri = output_uri

    def __call__(self, task: ShardTask) -> dict[str, Any]:
        """Plan: `SHARD_PLAN_SCHEMA`; payload: name, first_id; result: a `ShardPart` as JSON.

        Raises:
            Fatal: A source image is not what it was when it was checked.
            RuntimeError: It cannot be read now.
        """
        plan = read_plan(task)
        first_id, name = int(task.payload["first_id"]), str(task.payload["name"])
        columns = {
            "id": pa.array(np.arange(first_id, first_id + len(plan)), pa.int64()),
            "key": _column(plan, "key"),
            "label": _column(plan, "label"),
            "image": _pictures(plan),
            "source_sha256": pa.array([digest.as_py().hex() for digest in plan["sha256"]]),
            "source_width": _column(plan, "width"),
            "source_height": _column(plan, "height"),
        }
        batch = pa.record_batch(list(columns.values()), schema=PICTURE_SCHEMA)
        return write_picture_shard(self._output_uri, name, batch).to_json()


def _column(plan: pa.Table, name: str) -> pa.Array:
    return plan[name].combine_chunks()


def _pictures(plan: pa.Table) -> pa.Array:
    """Column of the pictures, each copied once to its place in the shard."""
    sizes = plan["size_bytes"].to_numpy()
    ends = np.concatenate([[0], np.cumsum(sizes)])
    content = np.empty(int(ends[-1]), np.uint8)
    for row, data in _in_place_order(plan):
        content[ends[row] : ends[row + 1]] = np.frombuffer(data, np.uint8)
    offsets = pa.py_buffer(ends.astype(np.int32))
    return pa.Array.from_buffers(pa.binary(), len(sizes), [None, offsets, pa.py_buffer(content)])


def _in_place_order(plan: pa.Table) -> Iterator[tuple[int, bytes]]:
    """Row and picture, in the order in which they lie in their files."""
    rows = plan.to_pylist()
    order = sorted(range(len(rows)), key=lambda i: (rows[i]["uri"], rows[i]["start"]))
    spans = [_span(rows[i]) for i in order]
    for row, data in zip(order, read_spans(spans), strict=True):
        if isinstance(data, OSError) or not _is_unchanged(rows[row], data):
            raise _changed(rows[row]["key"], data)
        yield row, data


def _changed(key: str, data: bytes | OSError) -> RuntimeError:
    reason = str(data) if isinstance(data, OSError) else "its content is another"
    may_come_back = isinstance(data, OSError) and data.errno not in {None, errno.ENOENT}
    return (RuntimeError if may_come_back else Fatal)(
        f"source image {key!r} has changed since it was checked ({reason}): expected a source that "
        "stays as it is. Run the stage again."
    )


def _span(row: dict[str, Any]) -> Span:
    return Span(file_name(row["uri"]), row["start"], row["size_bytes"])


def _is_unchanged(row: dict[str, Any], data: bytes) -> bool:
    return not row["is_source"] or hashlib.sha256(data).digest() == row["sha256"]
