"""Compare-and-swap of a small file, for leases: change it only if nobody else did.

On S3 by ETag and If-Match (AWS, SeaweedFS); on a file system under a lock file, since POSIX has no
such operation.
"""

import hashlib

from drorae.store import atomic, files, s3
from drorae.store.errors import is_s3


def read_versioned(uri: str) -> tuple[bytes, str]:
    """Content of a small file and a version that changes with it, for `write_if_version`.

    Raises:
        FileNotFoundError: If there is none.
    """
    if is_s3(uri):
        return s3.get_with_etag(uri)
    data = files.read_bytes(uri)
    return data, hashlib.sha256(data).hexdigest()


def write_if_version(uri: str, data: bytes, version: str) -> bool:
    """Replace a file only if it still has this version; False if it changed or is gone."""
    if is_s3(uri):
        return s3.put_if(uri, data, version)
    with atomic.guarded(uri):
        if not _has_version(uri, version):
            return False
        files.write_bytes(uri, data)
        return True


def delete_if_version(uri: str, version: str) -> None:
    """Delete a file if it still has this version."""
    if is_s3(uri):
        s3.delete_if(uri, version)
        return
    with atomic.guarded(uri):
        if _has_version(uri, version):
            files.delete(uri)


def _has_version(path: str, version: str) -> bool:
    try:
        return read_versioned(path)[1] == version
    except FileNotFoundError:
        return False
