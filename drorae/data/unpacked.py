"""Shards unpacked once into memory-mappable local files.

Random access to single rows of a Parquet file would decode a whole row group for each. The unpacked
copy lies in a cache folder under the sha256 of its shard, appears atomically, and may be deleted at
any time.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def unpacked(folder: Path, build: Callable[[Path], None]) -> Path:
    """Make `folder` with `build(temporary folder)` unless it exists; two processes may race for it.

    Args:
        folder: Final place; its name must state its content (a digest).
        build: Writes the files into the folder that it is given.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"partial-{folder.name}-"))
    try:
        build(temporary)
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, which is as good
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
