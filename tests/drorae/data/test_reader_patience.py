"""Sources on an S3 server that goes away while they are listed and read."""

import io
import random
import tarfile
import zipfile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.spec import AbstractBufferedFile

from drorae.data.readers import filesystem
from drorae.data.readers.candidates import to_candidates
from drorae.data.readers.source import list_source, read_records
from drorae.store import patience


class EndpointConnectionError(Exception):
    """Named like the error of botocore."""


class Store:
    """An object store of which every second request fails, or all of them while `is_away`."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects
        self.is_away = False
        self.num_requests = 0

    def request(self) -> None:
        self.num_requests += 1
        if self.is_away or self.num_requests % 2:
            raise EndpointConnectionError

    def call_s3(self, method: str, Bucket: str, Prefix: str, Delimiter: str = "") -> dict[str, Any]:
        self.request()
        inside = [key.removeprefix(f"{Bucket}/") for key in sorted(self.objects)]
        inside = [key for key in inside if key.startswith(Prefix)]
        if Delimiter:
            return {"CommonPrefixes": [{"Prefix": f"{Prefix}cat/"}]}
        return {"Contents": [{"Key": key, "Size": 0, "ETag": "e"} for key in inside]}

    def cat_file(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        self.request()
        return self.objects[path][start:end]

    def open(self, path: str, mode: str, cache_type: str, block_size: int = 64) -> "Opened":
        self.request()
        return Opened(self, path, cache_type)


class Opened(AbstractBufferedFile):
    """An open object as s3fs has it, with small blocks."""

    def __init__(self, store: Store, path: str, cache_type: str) -> None:
        self.store = store
        size = len(store.objects[path])
        super().__init__(store, path, block_size=64, cache_type=cache_type, size=size)

    def _fetch_range(self, start: int, end: int) -> bytes:
        self.store.request()
        return self.store.objects[self.path][start:end]


# pyarrow reads the last 64 kB of a file at once.
PICTURES = {f"cat/{number}.png": random.Random(number).randbytes(50_000) for number in range(3)}


def as_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in PICTURES.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def as_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in PICTURES.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def as_parquet() -> bytes:
    buffer = io.BytesIO()
    table = pa.table({"image": list(PICTURES.values()), "label": ["cat"] * 3})
    pq.write_table(table, buffer, row_group_size=1)
    return buffer.getvalue()


SOURCES: dict[str, dict[str, bytes]] = {
    "s3://b/folder": {f"b/folder/{name}": data for name, data in PICTURES.items()},
    "s3://b/all.zip": {"b/all.zip": as_zip()},
    "s3://b/all.tar": {"b/all.tar": as_tar()},
    "s3://b/all.parquet": {"b/all.parquet": as_parquet()},
}


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(patience, "PATIENCE_S", 0.2)

    def use(uri: str) -> Store:
        store = Store(SOURCES[uri])
        monkeypatch.setattr(filesystem.s3, "filesystem", lambda: store)
        return store

    return use


@pytest.mark.parametrize("uri", SOURCES)
def test_every_second_request_may_fail(uri, use):
    store = use(uri)
    listing = list_source(uri)
    assert not listing.rejects
    assert [r.data for r in read_records(to_candidates(listing.table))] == list(PICTURES.values())
    assert store.num_requests >= 4


@pytest.mark.parametrize("uri", SOURCES)
def test_a_store_that_stays_away_ends_the_reading_and_rejects_no_image(uri, use):
    store = use(uri)
    listing = list_source(uri)
    store.is_away = True
    with pytest.raises(RuntimeError, match="did not answer"):
        list(read_records(to_candidates(listing.table)))
