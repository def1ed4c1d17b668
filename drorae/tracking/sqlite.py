"""SQLite files that several processes of one machine use as their MLflow server."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


def sqlite_path(uri: str) -> Path | None:
    """The file of a sqlite:/// address; None for a server."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:") else None


def artifact_location(uri: str) -> str | None:
    """Where a new experiment keeps its files: beside the database; None: the server decides."""
    # For SQLite MLflow's default would be ./mlruns in the current folder.
    database = sqlite_path(uri)
    # Not through links, which are not kept as long as the database.
    return (database.parent.resolve() / "mlflow-artifacts").as_uri() if database else None


@contextlib.contextmanager
def sqlite_lock(uri: str) -> Iterator[None]:
    """Hold the database's lock file against other processes; nothing for a server."""
    database = sqlite_path(uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{database}.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
