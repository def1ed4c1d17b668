"""Files that the tasks of `evaluate` leave in the work folder: features, values, pictures shown."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from drorae.evaluation.features import FeatureSet
from drorae.store import files

__all__ = [
    "StoredSet",
    "feature_uri",
    "read_arrays",
    "read_features",
    "values_uri",
    "write_arrays",
    "write_features",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSet:
    """Features of one set of images: which files hold them."""

    folder: str
    """Name below the features in the work folder."""
    num_images: int
    """Rows that count."""
    chunk: int
    """Rows of a file."""
    decoder: str | None = None
    """Stage of the decoder that drew the images; photos have none."""

    def uris(self, work_uri: str) -> list[str]:
        """The files, in the order of their rows."""
        starts = range(0, self.num_images, self.chunk)
        return [feature_uri(work_uri, self.folder, start) for start in starts]


def feature_uri(work_uri: str, folder: str, start: int) -> str:
    """File with the features of the images from `start` on."""
    return files.join(work_uri, "features", folder, f"{start:08d}.npz")


def values_uri(work_uri: str, kind: str, start: int) -> str:
    """File with values per image and pictures: `photos`, `routing` or a guidance."""
    return files.join(work_uri, "values", kind, f"{start:08d}.npz")


def write_features(uri: str, parts: Sequence[FeatureSet]) -> None:
    """Write the rows of several sets as one file, atomically."""
    write_arrays(
        uri,
        pooled=np.concatenate([part.pooled for part in parts]),
        logits=np.concatenate([part.logits for part in parts]),
    )


def read_features(uris: Sequence[str], num_rows: int) -> FeatureSet:
    """The first rows of several files, in their order.

    Holds the set once and one file beside it: 4 bytes a number.

    Raises:
        ValueError: If the files have fewer rows.
    """
    pooled = logits = np.zeros((0, 0), np.float32)
    done = 0
    for uri in uris:
        part = read_arrays(uri)
        if not done:
            pooled = np.empty((num_rows, part["pooled"].shape[1]), np.float32)
            logits = np.empty((num_rows, part["logits"].shape[1]), np.float32)
        size = min(len(part["pooled"]), num_rows - done)
        pooled[done : done + size] = part["pooled"][:size]
        logits[done : done + size] = part["logits"][:size]
        done += size
    if done < num_rows:
        raise ValueError(
            f"{len(uris)} files of features have {done} rows: expected {num_rows}; the first is "
            f"{uris[0] if uris else None}."
        )
    return FeatureSet(pooled=pooled, logits=logits)


def write_arrays(uri: str, **arrays: Any) -> None:
    """Write arrays under names as one file, atomically."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    files.write_bytes(uri, buffer.getvalue())


def read_arrays(uri: str) -> dict[str, np.ndarray]:
    """All arrays of one file."""
    with np.load(io.BytesIO(files.read_bytes(uri))) as data:
        return {name: data[name] for name in data.files}
