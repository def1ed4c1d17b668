"""The one S3 client of the project.

Endpoint and keys come from AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_SESSION_TOKEN and AWS_DEFAULT_REGION; without keys botocore looks for instance roles. s3fs is
imported on first use: it costs about a second.
"""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec.asyn

from drorae.store.errors import clear_errors, error_code, explain, missing_bucket, split
from drorae.store.patience import patience, patiently

# 2 tries of s3fs, 2 tries of botocore in each, 4 s to connect: an endpoint that drops packets fails
# in under 20 s, and a server that answers 500 or 503 now and then is asked four times. Longer
# outages are a matter of `patience.py`, which knows which requests may wait.
CONNECT_TIMEOUT_S = 4
READ_TIMEOUT_S = 60
NUM_BOTOCORE_TRIES = 2
NUM_S3FS_TRIES = 2

# Parts above 10000 are refused by S3: 50 MiB each allow objects of 500 GB.
PART_BYTES = 50 * 2**20


def filesystem() -> Any:
    """The s3fs client for the present environment variables and process."""
    env = os.environ.get
    return _filesystem(
        os.getpid(),
        env("AWS_ENDPOINT_URL_S3") or env("AWS_ENDPOINT_URL"),
        (env("AWS_ACCESS_KEY_ID"), env("AWS_SECRET_ACCESS_KEY"), env("AWS_SESSION_TOKEN")),
        env("AWS_DEFAULT_REGION") or env("AWS_REGION"),
    )


@functools.lru_cache(maxsize=8)
def _filesystem(
    pid: int,
    endpoint: str | None,
    keys: tuple[str | None, str | None, str | None],
    region: str | None,
) -> Any:
    del pid  # only part of the cache key: a client must not be shared with a forked child
    import s3fs  # about one second of import; local workspaces do not pay it

    client = s3fs.S3FileSystem(
        endpoint_url=endpoint,
        key=keys[0],
        secret=keys[1],
        token=keys[2],
        client_kwargs={"region_name": region} if region else {},
        config_kwargs={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "retries": {"total_max_attempts": NUM_BOTOCORE_TRIES, "mode": "standard"},
        },
        # Other processes write too: a cached listing would hide their files.
        use_listings_cache=False,
        default_fill_cache=False,
        skip_instance_cache=True,
    )
    client.retries = NUM_S3FS_TRIES
    return client


@dataclass(frozen=True, slots=True)
class Page:
    """What one listing request answers: up to 1,000 names, relative to the prefix asked for."""

    objects: list[tuple[str, int, str]]
    """Name, size in bytes, and ETag."""
    folders: list[str]
    """Names that go on after a slash, with it; empty unless they were asked for."""


def list_pages(prefix_uri: str, *, by_folder: bool = False) -> Iterator[Page]:
    """All objects whose address begins with a prefix, a page at a time and a page a request.

    Args:
        prefix_uri: Address of a folder, with a slash at its end.
        by_folder: Name the folders directly under it instead of the objects in them.
    """
    bucket, prefix = split(prefix_uri)
    asked: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix}
    if by_folder:
        asked["Delimiter"] = "/"
    while asked:
        request = functools.partial(_list_page, asked)
        with clear_errors(prefix_uri):
            reply = patiently(request)
        found = reply.get("Contents", [])
        inside = reply.get("CommonPrefixes", [])
        yield Page(
            objects=[(e["Key"][len(prefix) :], int(e["Size"]), e["ETag"]) for e in found],
            folders=[entry["Prefix"][len(prefix) :] for entry in inside],
        )
        token = reply.get("NextContinuationToken")
        asked = {**asked, "ContinuationToken": token} if reply.get("IsTruncated") else {}


def _list_page(asked: dict[str, Any]) -> dict[str, Any]:
    return filesystem().call_s3("list_objects_v2", **asked)


def get_with_etag(uri: str) -> tuple[bytes, str]:
    """Content of a small object and the ETag that belongs to exactly this content.

    Raises:
        FileNotFoundError: If there is no such object.
    """
    client = filesystem()
    bucket, key = split(uri)

    async def fetch() -> tuple[bytes, str]:
        reply = await client._call_s3("get_object", Bucket=bucket, Key=key)
        async with reply["Body"] as body:
            return await body.read(), reply["ETag"]

    with clear_errors(uri):
        data, etag = patiently(lambda: fsspec.asyn.sync(client.loop, fetch))  # pyright: ignore[reportGeneralTypeIssues]
        return data, etag


def put_if(uri: str, data: bytes, etag: str | None) -> bool:
    """Write an object only if its ETag is still `etag` (None: only if it does not exist).

    Returns:
        False if another writer was faster, or an earlier try of this write whose answer was lost.
    """
    condition = {"mode": "create"} if etag is None else {"IfMatch": etag}
    try:
        patiently(lambda: filesystem().pipe_file(uri, data, **condition))
    except Exception as error:
        lost_race = {"PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "412", "409"}
        if isinstance(error, FileExistsError) or error_code(error) in lost_race:
            return False
        raise explain(error, uri) from error
    return True


def delete_if(uri: str, etag: str) -> None:
    """Delete an object if its ETag is still `etag`.

    A server that knows no conditional delete ignores the condition.
    """
    bucket, key = split(uri)
    try:
        patiently(
            lambda: filesystem().call_s3("delete_object", Bucket=bucket, Key=key, IfMatch=etag)
        )
    except Exception as error:
        if error_code(error) not in {"PreconditionFailed", "NoSuchKey", "412", "404"}:
            raise explain(error, uri) from error


def check_bucket(uri: str) -> None:
    """Raise a clear error, at once, unless the bucket exists and the keys may see it."""
    bucket, _ = split(uri)
    try:
        with patience(0):
            filesystem().call_s3("head_bucket", Bucket=bucket)
    except Exception as error:
        if isinstance(error, FileNotFoundError) or error_code(error) in {"404", "NoSuchBucket"}:
            raise missing_bucket(uri) from error
        raise explain(error, uri) from error
