"""What a training checkpoint is in a folder, and how one rank writes and reads its parts.

The checkpoint of step 500 is made of

- `step-00000500.<rank>.bin`: the tensors that this rank keeps, one after the other, as raw bytes;
- `step-00000500.pt`: the small state of rank 0, by `torch.save`;
- `step-00000500.json`: the marker, written last. It lists size and sha256 of the others, and where
  in which file each chunk of each tensor lies: about 100 bytes for a chunk, so it grows with the
  number of tensors, and with the number of ranks where they are sharded (1.5 MB for 1600 tensors on
  8 ranks).

Who writes what, and what a rank has to read for its shard after the number of ranks has changed, is
planned by torch.distributed.checkpoint (DCP). Tensors that all ranks hold alike are spread over
their files. A file is read from start to end by each rank that needs something of it, and counts
only if its sha256 is right: nothing is taken from a damaged one.
"""

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from drorae.failure import Fatal
from drorae.store import files
from drorae.store.files import FileEntry

__all__ = [
    "Damaged",
    "Layout",
    "check_tensors",
    "plan_layout",
    "read_marker",
    "read_parts",
    "read_small",
    "write_part",
]

FORMAT = 3
"""Changes when older checkpoints can no longer be read. 2: one file of whole tensors."""

WRITE_BYTES = 8 * 2**20
"""Written at once: the client of S3 copies what it is given."""

Exchange = Callable[[Any], list[Any]]
"""Gives a value to all ranks and returns everyone's, by rank."""


class Damaged(Exception):
    """A checkpoint that is not whole: another one has to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A box of a tensor as one rank's file holds it."""

    name: str
    """Of the tensor."""
    rank: int
    """Whose file."""
    position: int
    """First byte in that file."""
    offsets: tuple[int, ...]
    """Where the box begins in the whole tensor."""
    sizes: tuple[int, ...]
    """Its shape."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Which rank keeps which chunk of which tensor, in the order of its file."""

    chunks: tuple[Chunk, ...]
    """Of all ranks."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of every whole tensor."""
    dtypes: dict[str, torch.dtype]
    """Type of every tensor."""

    def of_rank(self, rank: int) -> list[Chunk]:
        """The chunks in the file of a rank; at most one of each tensor."""
        return [chunk for chunk in self.chunks if chunk.rank == rank]

    def owners(self) -> dict[str, int]:
        """The last rank that keeps something of each tensor: the only one of a whole tensor."""
        return {chunk.name: chunk.rank for chunk in self.chunks}

    def marker(self, step: int, entries: list[FileEntry]) -> bytes:
        """Content of the marker of a checkpoint with these files."""
        tensors: dict[str, Any] = {
            name: [str(self.dtypes[name]).removeprefix("torch."), shape, []]
            for name, shape in self.shapes.items()
        }
        for chunk in self.chunks:
            tensors[chunk.name][2].append((chunk.rank, chunk.position, chunk.offsets, chunk.sizes))
        listed = {entry.name: [entry.size_bytes, entry.sha256] for entry in entries}
        record = {"format": FORMAT, "step": step, "files": listed, "tensors": tensors}
        return json.dumps(record, separators=(",", ":")).encode()


@dataclass(frozen=True, kw_only=True, slots=True)
class Marker:
    """A marker that was read."""

    files: dict[str, tuple[int, str]]
    """Size in bytes and sha256 of every file, by name."""
    layout: Layout
    """What lies where."""


def plan_layout(tensors: Mapping[str, Tensor], exchange: Exchange) -> Layout:
    """Decide who keeps what (a collective; every rank comes to the same result).

    Args:
        tensors: Sharded ones (DTensor), or whole ones that all ranks hold alike.
        exchange: Connects the ranks, a few hundred bytes for each tensor of each rank.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors), is_coordinator=False)
    plans, metadata = planner.create_global_plan(exchange(planner.create_local_plan()))
    chunks = []
    for rank, plan in enumerate(plans):
        position = 0
        for item in plan.items:
            assert item.tensor_data is not None, "all entries are tensors"
            box, dtype = item.tensor_data.chunk, item.tensor_data.properties.dtype
            offsets, sizes = tuple(box.offsets), tuple(box.sizes)
            name = item.index.fqn
            chunks.append(
                Chunk(name=name, rank=rank, position=position, offsets=offsets, sizes=sizes)
            )
            position += _num_bytes(sizes, dtype)
    known = metadata.state_dict_metadata
    tables = {k: v for k, v in known.items() if isinstance(v, TensorStorageMetadata)}
    return Layout(
        chunks=tuple(chunks),
        shapes={name: tuple(table.size) for name, table in tables.items()},
        dtypes={name: table.properties.dtype for name, table in tables.items()},
    )


def write_part(uri: str, chunks: list[Chunk], copies: Mapping[str, Tensor]) -> FileEntry:
    """Write the file of a rank from copies of its parts, without another copy of any of them."""

    def save(target: BinaryIO) -> None:
        for chunk in chunks:
            data = _bytes_of(copies[chunk.name])
            for start in range(0, len(data), WRITE_BYTES):
                target.write(data[start : start + WRITE_BYTES])

    return files.write_with(uri, save)


def read_marker(uri: str) -> Marker:
    """Read a marker.

    Raises:
        Damaged: It is not a whole one.
        Fatal: It is one of another format.
    """
    try:
        record = files.read_json(uri)
        found = record.get("format", "1 or 2")  # markers did not tell it before 3
        if found != FORMAT:
            raise Fatal(
                f"{uri}: the training checkpoint has format {found}: expected {FORMAT}; "
                "finish the stage with the version that wrote it, or delete its checkpoints."
            )
        tensors = record["tensors"]
        chunks = [
            Chunk(name=name, rank=rank, position=at, offsets=tuple(offsets), sizes=tuple(sizes))
            for name, (_, _, boxes) in tensors.items()
            for rank, at, offsets, sizes in boxes
        ]
        layout = Layout(
            chunks=tuple(sorted(chunks, key=lambda chunk: (chunk.rank, chunk.position))),
            shapes={name: tuple(shape) for name, (_, shape, _) in tensors.items()},
            dtypes={name: getattr(torch, dtype) for name, (dtype, _, _) in tensors.items()},
        )
        listed = {name: (size, sha256) for name, (size, sha256) in record["files"].items()}
    except (FileNotFoundError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(f"{uri} is left out: {error!r}") from error
    return Marker(files=listed, layout=layout)


def check_tensors(uri: str, marker: Marker, layout: Layout) -> None:
    """Refuse a checkpoint of other tensors than those that are to be filled.

    Raises:
        Fatal: Names one that differs.
    """
    for name in sorted(marker.layout.shapes.keys() | layout.shapes.keys()):
        for what in ("shape", "dtype"):
            there, here = (getattr(of, f"{what}s").get(name) for of in (marker.layout, layout))
            if there != here:
                raise Fatal(
                    f"{uri}: {name} has the {what} {there} in the checkpoint and {here} in the "
                    "model: expected the same tensors; finish the stage with the configuration and "
                    "version that wrote it, or delete its checkpoints."
                )


def read_parts(
    stem_uri: str, marker: Marker, tensors: Mapping[str, Tensor], spaces: Mapping[str, Tensor]
) -> None:
    """Fill host memory with the parts of some tensors that belong to this rank.

    Beside that memory it takes 8 MiB, and one chunk while a box is cut in another way.

    Args:
        stem_uri: Folder and name of the checkpoint.
        marker: Its marker.
        tensors: Which tensors; their values are not looked at.
        spaces: Contiguous memory of their local parts. It holds anything after an error.

    Raises:
        Damaged: A file is missing or not what the marker says.
    """
    wanted: dict[tuple[str, tuple[int, ...]], list[ReadItem]] = {}
    for item in create_default_local_load_plan(dict(tensors), _metadata(marker.layout)).items:
        assert item.storage_index.offset is not None, "chunks have places"
        box = item.storage_index.fqn, tuple(item.storage_index.offset)
        wanted.setdefault(box, []).append(item)
    chunks = marker.layout.chunks
    for rank in sorted({c.rank for c in chunks if (c.name, c.offsets) in wanted}):
        source = CheckedFile(f"{stem_uri}.{rank}.bin", marker)
        for chunk in marker.layout.of_rank(rank):
            items = wanted.get((chunk.name, chunk.offsets), [])
            _read_chunk(source, chunk, marker.layout.dtypes[chunk.name], items, spaces)
        source.finish()


def _read_chunk(
    source: "CheckedFile",
    chunk: Chunk,
    dtype: torch.dtype,
    items: list[ReadItem],
    spaces: Mapping[str, Tensor],
) -> None:
    space = spaces.get(chunk.name) if items else None
    if space is None:
        source.skip(_num_bytes(chunk.sizes, dtype))
    elif len(items) == 1 and tuple(items[0].lengths) == chunk.sizes == tuple(space.shape):
        source.fill(space)  # nothing was cut in another way
    else:
        whole = torch.empty(chunk.sizes, dtype=dtype)
        source.fill(whole)
        for item in items:
            _box(space, item.dest_offsets, item.lengths).copy_(
                _box(whole, item.storage_offsets, item.lengths)
            )


def read_small(uri: str, marker: Marker) -> Any:
    """The small state.

    Raises:
        Damaged: The file is missing or not what the marker says.
    """
    source = CheckedFile(uri, marker)
    data = torch.empty(source.size_bytes, dtype=torch.uint8)
    source.fill(data)
    source.finish()
    return torch.load(io.BytesIO(_bytes_of(data)), map_location="cpu", weights_only=True)


class CheckedFile:
    """A file of a checkpoint, read once from start to end and hashed as it passes.

    Args:
        uri: Where.
        marker: What its size and sha256 should be.

    Raises:
        Damaged: It is missing or has another size.
    """

    def __init__(self, uri: str, marker: Marker) -> None:
        self._uri = uri
        try:
            self.size_bytes, self._sha256 = marker.files[uri.rsplit("/", 1)[-1]]
            found = files.size(uri)
        except (FileNotFoundError, KeyError) as error:
            raise Damaged(f"{uri} is left out: {error!r}") from error
        if found != self.size_bytes:
            raise Damaged(f"{uri} is left out: {found} bytes of {self.size_bytes}")
        self._hash = hashlib.sha256()
        self._pieces = files.read_chunks(uri)
        self._left = memoryview(b"")

    def fill(self, tensor: Tensor) -> None:
        """Read the next bytes into a contiguous tensor on the host."""
        target = _bytes_of(tensor)
        for at, piece in self._next(target.nbytes):
            target[at : at + len(piece)] = piece

    def skip(self, num_bytes: int) -> None:
        """Read past the next bytes."""
        for _ in self._next(num_bytes):
            pass

    def finish(self) -> None:
        """Raise `Damaged` if what was read is not what was written."""
        if self._hash.hexdigest() != self._sha256:
            raise Damaged(f"{self._uri} is left out: its content was changed")

    def _next(self, num_bytes: int) -> Iterator[tuple[int, memoryview]]:
        at = 0
        while at < num_bytes:
            if not self._left:
                self._left = memoryview(next(self._pieces, b""))
                self._hash.update(self._left)
                if not self._left:
                    raise Damaged(f"{self._uri} is left out: it ends early")
            piece = self._left[: num_bytes - at]
            self._left = self._left[len(piece) :]
            yield at, piece
            at += len(piece)


def _metadata(layout: Layout) -> Metadata:
    """A layout in the words of DCP."""
    tables = {
        name: TensorStorageMetadata(
            properties=TensorProperties(dtype=layout.dtypes[name]),
            size=torch.Size(shape),
            chunks=[],
        )
        for name, shape in layout.shapes.items()
    }
    for chunk in layout.chunks:
        box = ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
        tables[chunk.name].chunks.append(box)
    return Metadata(dict(tables))


def _box(tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    return tensor[tuple(slice(o, o + size) for o, size in zip(offsets, sizes, strict=True))]


def _num_bytes(sizes: Sequence[int], dtype: torch.dtype) -> int:
    return math.prod(sizes) * dtype.itemsize


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host; `view` refuses any other."""
    return tensor.view(-1).view(torch.uint8).numpy().data
