"""A plain name for a folder whose path does not fit into a database URL.

SQLAlchemy, Prefect and MLflow read `?`, `#` and `%` of a path differently, and MLflow makes the
folder of a SQLite URL under its escaped name. A link with a plain name serves all three.
"""

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

from drorae.store.files import default_cache_path

PLAIN = re.compile(r"[A-Za-z0-9/._+=,@~-]*")


def is_plain(path: Path) -> bool:
    """Return whether a path stands for itself in a URL."""
    return PLAIN.fullmatch(str(path)) is not None


def plain_path(path: Path) -> Path:
    """Return a folder's path if it is plain, else that of a link to it in the user's cache.

    Raises:
        ValueError: If the cache has no plain path either.
    """
    if is_plain(path):
        return path
    links = default_cache_path().absolute() / "links"
    if not is_plain(links):
        raise ValueError(
            f"{path} does not fit into a database URL, and neither does the cache {links}: "
            "expected letters, digits and ._+=,@~- in one of them. Set DRORAE_CACHE to such a "
            "folder, or choose another workspace."
        )
    links.mkdir(parents=True, exist_ok=True)
    link = links / hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    with suppress(FileExistsError):  # the name says where it leads
        link.symlink_to(path)
    return link
