"""Outputs of the stages `shard` and `latents`, written directly: no source, no encoder."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from data_fakes import committed
from safetensors.torch import save
from torch import from_numpy

from drorae.config import to_json
from drorae.data.jobs import ShardJob
from drorae.data.shard_format import (
    PICTURE_SCHEMA,
    part_name,
    write_index,
    write_latent_shard,
    write_picture_shard,
)
from drorae.store import s3
from drorae.store.context import StageContext, StageResult
from drorae.store.workspace import StageOutput


def picture_output(
    root: str | Path,
    pictures: Sequence[bytes],
    rows_per_shard: int = 4,
    shard: ShardJob | None = None,
    **counts: Any,
) -> StageOutput:
    """Pictures as both splits, labels 0, 1, 2, 0, 1, ..."""
    ctx = StageContext(stage="shard", key="shard-key", output_uri=f"{root}/shard")
    entries = []
    for split in ("train", "val"):
        starts = range(0, len(pictures), rows_per_shard)
        parts = [
            write_picture_shard(
                ctx.output_uri,
                part_name(split, number),
                _rows(pictures[start : start + rows_per_shard], start),
            )
            for number, start in enumerate(starts)
        ]
        entries += [part.entry for part in parts]
        entries.append(write_index(ctx.output_uri, split, parts))
        counts[split] = {"rows": len(pictures), "shards": [len(part.labels) for part in parts]}
    counts = {"class_names": ["a", "b", "c"], "resolution_px": 16} | counts
    settings = {"pictures": "square", "crop": "center"}
    if shard is not None:
        settings = to_json(shard)
    entries += [
        ctx.put_json("counts.json", counts),
        ctx.put_json("config.json", {"shard": settings}),
    ]
    return committed(ctx, StageResult(files=entries))


def _rows(pictures: Sequence[bytes], first: int) -> pa.RecordBatch:
    count = len(pictures)
    columns = {
        "id": range(first, first + count),
        "key": [f"a/{first + number}" for number in range(count)],
        "label": [(first + number) % 3 for number in range(count)],
        "image": list(pictures),
        "source_sha256": [hashlib.sha256(data).hexdigest() for data in pictures],
        "source_width": [1] * count,
        "source_height": [1] * count,
    }
    return pa.RecordBatch.from_pydict(
        {
            name: pa.array(values, PICTURE_SCHEMA.field(name).type)
            for name, values in columns.items()
        }
    )


def latent_output(
    root: str | Path, rows: Sequence[int] = (4, 4, 2), shape: Sequence[int] = (2, 3, 3)
) -> tuple[StageOutput, dict[str, np.ndarray]]:
    """Random latents of both views in shards of so many rows; the output and its columns."""
    draw = np.random.default_rng(0)
    columns = {
        name: draw.normal(size=(sum(rows), *shape)).astype(np.float16)
        for name in ("latent", "latent_flip")
    }
    ctx = StageContext(stage="latents", key="latents-key", output_uri=f"{root}/latents")
    parts = []
    for number, start in enumerate(np.cumsum([0, *rows])[:-1]):
        inside = slice(start, start + rows[number])
        values = {name: column[inside] for name, column in columns.items()}
        labels = np.arange(start, start + rows[number]) % 3
        name = part_name("train", number)
        parts.append(write_latent_shard(ctx.output_uri, name, values, labels, int(start)))
    stats = {"mean": from_numpy(np.zeros(shape, np.float32)), "var": from_numpy(np.ones(shape))}
    counts = {"train": {"rows": sum(rows), "shards": list(rows)}, "shape": shape, "flip": True}
    entries = [
        *(part.entry for part in parts),
        write_index(ctx.output_uri, "train", parts),
        ctx.put_bytes("stats.safetensors", save(stats)),
        ctx.put_json("counts.json", counts),
    ]
    return committed(ctx, StageResult(files=entries)), columns


class Remote:
    """A stand-in for the S3 client: files of a local folder, every request noted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[tuple[str, int | None, int | None]] = []

    def cat_file(self, uri: str, start: int | None = None, end: int | None = None) -> bytes:
        name = uri.removeprefix("s3://bucket/")
        self.requests.append((name, start, end))
        return (self.folder / name).read_bytes()[start:end]

    def fetched(self, suffix: str) -> int:
        """Requests for files that end so."""
        return sum(name.endswith(suffix) for name, _, _ in self.requests)


def as_remote(output: StageOutput, monkeypatch: pytest.MonkeyPatch) -> tuple[StageOutput, Remote]:
    """The same output at an s3:// address that a fake client serves."""
    folder = Path(output.uri)
    remote = Remote(folder.parent)
    monkeypatch.setattr(s3, "filesystem", lambda: remote)
    return StageOutput(uri=f"s3://bucket/{folder.name}", manifest=output.manifest), remote
