"""Files that a user names in a configuration, known by content: moving one changes no key."""

import functools
import os
import re

from drorae.store import files
from drorae.store.errors import is_s3

PREFIX = "sha256:"


def content_id(source: str) -> str:
    """`sha256:HEX` of a file, or the argument itself if it is that already; empty stays empty.

    The digest of an unchanged local file (path, size and time) is computed once in a process.

    Args:
        source: Local path, s3:// address, `sha256:HEX`, or empty.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the text after `sha256:` is no digest.
    """
    if not source or source.startswith(PREFIX):
        return _checked(source)
    if is_s3(source):
        return PREFIX + _sha256(source, files.size(source), 0)
    path = os.path.expanduser(source)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{source} does not exist: expected a file; check the path.")
    found = os.stat(path)
    return PREFIX + _sha256(path, found.st_size, found.st_mtime_ns)


def _checked(source: str) -> str:
    if source and not re.fullmatch(r"[0-9a-f]{64}", source.removeprefix(PREFIX)):
        raise ValueError(f"{source!r} is no digest: expected sha256: and 64 hexadecimal digits.")
    return source


@functools.lru_cache(maxsize=32)
def _sha256(uri: str, size_bytes: int, mtime_ns: int) -> str:
    del size_bytes, mtime_ns  # part of the cache's key: another size or time, another content
    return files.sha256_of(uri)
