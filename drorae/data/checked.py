"""What the driver of the shard stage knows of its candidates: columns, no objects.

About 250 bytes a candidate with the listing, for names of 30 characters.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from drorae.data.readers.candidates import Listing, dictionary_of
from drorae.data.selection import BAD, UNKNOWN, hash_order, val_mask
from drorae.data.shard_files import CHECKED_SCHEMA, SHARD_PLAN_SCHEMA, pack_uri, read_checked

KEYS_AT_ONCE = 65_536
"""Keys that are Python text at a time."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """All candidates of both splits; a candidate is its position in the listing."""

    listing: Listing
    """The listing."""
    labels: np.ndarray
    """Class of each candidate, int32; -1 where it has none."""
    rank: np.ndarray
    """Place of each candidate in hash order, int64."""
    orders: dict[str, np.ndarray]
    """Candidates of each split, `train` and `val`, in hash order."""

    @classmethod
    def of(cls, listing: Listing, seed: int, val_fraction: float) -> "Candidates":
        """Candidates of a listing, split and ordered by hash."""
        order = hash_order(_values(listing.table["key"]), seed)
        splits = _values(listing.table["split"])
        is_val = val_mask(_values(listing.table["key"]), splits, seed, val_fraction)[order]
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        number = {"": -1} | {name: label for label, name in enumerate(listing.class_names)}
        codes, names = dictionary_of(listing.table, "class_name")
        of_code = np.full(len(names), -1, np.int32)
        for code in np.unique(codes).tolist():  # rows that were left out may have had others
            of_code[code] = number[names[code]]
        return cls(
            listing=listing,
            labels=of_code[codes],
            rank=rank,
            orders={"train": order[~is_val], "val": order[is_val]},
        )

    def keys(self, positions: np.ndarray) -> list[str]:
        """Keys of some candidates."""
        return self.listing.table["key"].take(pa.array(positions)).to_pylist()

    def chunks(self, positions: np.ndarray, rows: int) -> Iterator[pa.Table]:
        """Rows of the listing with `position` and `rank`, about `rows` of neighbours at a time.

        What is only read together (the row groups of Parquet) stays together.
        """
        placed = self._in_place_order(positions)
        unit = self._units(placed)
        starts = np.flatnonzero(np.concatenate([[True], unit[1:] != unit[:-1]]))
        start = 0
        while start < len(placed):
            later = int(np.searchsorted(starts, start + rows))
            stop = int(starts[later]) if later < len(starts) else len(placed)
            chunk = placed[start:stop]
            table = self.listing.table.take(pa.array(chunk))
            table = table.append_column("position", pa.array(chunk))
            yield table.append_column("rank", pa.array(self.rank[chunk]))
            start = stop

    def _in_place_order(self, positions: np.ndarray) -> np.ndarray:
        containers = self._container_codes()[positions]
        index = self.listing.table["index"].to_numpy()[positions]
        return positions[np.lexsort((positions, index, containers))].astype(np.int64)

    def _container_codes(self) -> np.ndarray:
        containers: Any = self.listing.table["container"].combine_chunks()
        names = containers.dictionary.to_pylist()
        rank = np.empty(len(names), np.int64)
        rank[sorted(range(len(names)), key=lambda i: names[i])] = np.arange(len(names))
        return rank[containers.indices.to_numpy()]

    def _units(self, placed: np.ndarray) -> np.ndarray:
        """A number for each candidate, equal for those of one row group and else unique."""
        kinds: Any = self.listing.table["kind"].combine_chunks()
        is_grouped = np.array([kind == "parquet" for kind in kinds.dictionary.to_pylist()])
        is_whole = is_grouped[kinds.indices.to_numpy()[placed]]
        groups = self.listing.table["unit"].to_numpy()[placed]
        grouped = (self._container_codes()[placed] << 32) + groups
        return np.where(is_whole, grouped, -1 - np.arange(len(placed)))


def _values(column: pa.ChunkedArray) -> Iterator[str]:
    for start in range(0, len(column), KEYS_AT_ONCE):
        yield from column.slice(start, KEYS_AT_ONCE).to_pylist()


class Checked:
    """Outcomes of the checks of all rounds.

    Args:
        num_candidates: Candidates in the listing.
    """

    def __init__(self, num_candidates: int) -> None:
        self._table = CHECKED_SCHEMA.append(pa.field("task", pa.int32())).empty_table()
        self._tasks: list[str] = []
        self._row = np.full(num_candidates, -1, np.int64)

    def add(self, names: Sequence[str], results: Sequence[dict[str, Any]]) -> None:
        """Take the results of some tasks, by their names."""
        tables = [self._table]
        for name, result in zip(names, results, strict=True):
            table = read_checked(result)
            task = pa.array(np.full(len(table), len(self._tasks)), pa.int32())
            tables.append(table.append_column("task", task))
            self._tasks.append(name)
        self._table = pa.concat_tables(tables).combine_chunks()
        self._row[self._table["position"].to_numpy()] = np.arange(len(self._table))

    def content(self) -> np.ndarray:
        """Number of the content of every candidate, as `selection.choose` takes it."""
        content = np.full(len(self._row), UNKNOWN, np.int64)
        digests: Any = self._table["sha256"].combine_chunks().dictionary_encode()
        numbers = digests.indices.fill_null(BAD).to_numpy(zero_copy_only=False)
        content[self._table["position"].to_numpy()] = numbers
        return content

    def rejects(self) -> tuple[np.ndarray, list[str]]:
        """Rejected candidates and the reasons."""
        bad = self._table.filter(self._table["sha256"].is_null())
        return bad["position"].to_numpy(), bad["reason"].to_pylist()

    def sizes(self, positions: np.ndarray) -> np.ndarray:
        """Bytes that the pictures of good candidates take in a shard."""
        return self._of(positions)["size_bytes"].to_numpy()

    def shard_plan(self, candidates: Candidates, positions: np.ndarray, packs_uri: str) -> pa.Table:
        """Rows of a shard, `SHARD_PLAN_SCHEMA`, for good candidates."""
        found = self._of(positions)
        names = ["key", "kind", "container", "member"]
        rows = candidates.listing.table.select(names).take(pa.array(positions)).to_pylist()
        places = zip(found["task"].to_pylist(), found["pack"].to_pylist(), rows, strict=True)
        uris = [
            _source_uri(row) if pack < 0 else pack_uri(packs_uri, self._tasks[task], pack).encode()
            for task, pack, row in places
        ]
        columns = {
            "key": pa.array([row["key"] for row in rows]),
            "label": pa.array(candidates.labels[positions]),
            "uri": pa.array(uris, pa.binary()),
            "is_source": pa.array(found["pack"].to_numpy() < 0),
            **{name: found[name] for name in ("start", "size_bytes", "sha256", "width", "height")},
        }
        return pa.table(columns).select(SHARD_PLAN_SCHEMA.names).cast(SHARD_PLAN_SCHEMA)

    def _of(self, positions: np.ndarray) -> pa.Table:
        return self._table.take(pa.array(self._row[positions]))


def _source_uri(row: dict[str, Any]) -> bytes:
    """Address of the file that holds an image byte for byte."""
    container: bytes = row["container"]
    return container + b"/" + row["member"] if row["kind"] == "file" else container
