"""What a stage is given, and what it returns.

A stage reads `inputs`, writes its output through `put_bytes`, `put_json` and `put_file`, keeps what
a later attempt needs under `work_uri`, and returns a `StageResult`. It commits nothing:
`stage_run.py` does.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from drorae.config import ACCELERATED, Compute, Resources
from drorae.store import files
from drorae.store.files import FileEntry, join
from drorae.store.manifest import MANIFEST_NAME
from drorae.store.patience import patience
from drorae.store.workspace import WORK_NAME, StageOutput

log = logging.getLogger(__name__)

PROGRESS_NAME = "progress.json"
PROGRESS_EVERY_S = 2.0
PROGRESS_PAUSE_S = 15.0  # after a write that failed: an absent store costs every try up to 20 s


def allow_any(counts: dict[str, Any]) -> None:
    """A `StageContext.check_counts` that refuses nothing."""


def note_line(text: str, *, is_warning: bool) -> str:
    """A note as people see it."""
    return f"warning: {text}" if is_warning else text


@dataclass(kw_only=True, slots=True)
class StageResult:
    """What a stage made."""

    files: list[FileEntry]
    """Every file of the output, named relative to it."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Final numbers, for the manifest."""


@dataclass(kw_only=True, slots=True)
class StageContext:
    """Everything that a stage may touch."""

    stage: str
    """Stage name."""
    key: str
    """Key of the output that is being built."""
    output_uri: str
    """Folder of the output."""
    work_uri: str = ""
    """Folder for checkpoints, markers and progress; not part of the output, deleted at commit."""
    inputs: dict[str, StageOutput] = field(default_factory=dict)
    """Committed outputs that the stage reads, by stage name."""
    compute: Compute = field(default_factory=Compute)
    """How to run: workers, threads, intervals. The result does not depend on it."""
    workers: Resources = ACCELERATED
    """What one worker or actor of the stage takes of a cluster."""
    tracking_uri: str | None = None
    """MLflow address; None for no tracking."""
    tracking_run_id: str | None = None
    """MLflow run of this stage."""
    attempt: int = 1
    """Which attempt this is, from 1."""
    check_counts: Callable[[dict[str, Any]], None] = allow_any
    """Raises ValueError if a later stage of the run could not work with what this one is about to
    make; the stage calls it as soon as it knows the numbers of its `counts.json`."""
    _progress_start: tuple[float, float] | None = field(default=None, init=False, repr=False)
    _progress_unit: str = field(default="", init=False, repr=False)
    _progress_written_s: float = field(default=float("-inf"), init=False, repr=False)
    _notes: list[str] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        """Fill in the usual work folder."""
        self.work_uri = self.work_uri or join(self.output_uri, WORK_NAME)

    def put_bytes(self, name: str, data: bytes) -> FileEntry:
        """Write one file of the output, atomically.

        Raises:
            ValueError: If the name is absolute, leaves the folder or is reserved.
        """
        return replace(files.write_bytes(self._target(name), data), name=name)

    def put_json(self, name: str, value: Any) -> FileEntry:
        """Write one JSON file of the output, atomically."""
        return self.put_bytes(name, files.encode_json(value))

    def put_file(self, name: str, local_path: str | Path) -> FileEntry:
        """Copy a local file into the output, atomically.

        Raises:
            FileNotFoundError: If the local file does not exist.
            ValueError: If the name is absolute, leaves the folder or is reserved.
        """
        return replace(files.upload(local_path, self._target(name)), name=name)

    def _target(self, name: str) -> str:
        parts = name.split("/")
        if not all(parts) or {".", ".."} & set(parts) or parts[0] in {WORK_NAME, MANIFEST_NAME}:
            raise ValueError(
                f"output name {name!r} is not allowed: expected a relative path such as "
                f"'train/part-00000.parquet', not {WORK_NAME}/ or {MANIFEST_NAME}."
            )
        return join(self.output_uri, name)

    def note(self, text: str, *, is_warning: bool = False) -> None:
        """Tell the user one line: it goes to the log, and with the next progress to the console."""
        log.log(logging.WARNING if is_warning else logging.INFO, "%s", text)
        self._notes.append(note_line(text, is_warning=is_warning))
        self._progress_written_s = float("-inf")

    def progress(self, done: int | float, total: int | float, unit: str, **extra: Any) -> None:
        """Tell how far the stage is; at most one small write every 2 seconds, and one at the end.

        The rate counts from the first call with this unit, so a resumed stage, or one that
        encodes before it trains, shows its present speed. A store
        that cannot be written is logged and does not stop the stage.

        Args:
            done: Units finished, of `total`.
            total: Units in all.
            unit: What is counted, e.g. "images" or "steps".
            extra: `message` for people; further fields are stored as they are (JSON scalars).
        """
        now_s = time.monotonic()
        if self._progress_start is None or unit != self._progress_unit:
            self._progress_start, self._progress_unit = (now_s, done), unit
        if done < total and now_s - self._progress_written_s < PROGRESS_EVERY_S:
            return
        self._progress_written_s = now_s
        elapsed_s, finished = now_s - self._progress_start[0], done - self._progress_start[1]
        rate = finished / elapsed_s if elapsed_s > 0 and finished > 0 else None
        record = {
            "stage": self.stage,
            "done": done,
            "total": total,
            "unit": unit,
            "rate_per_s": rate,
            "eta_s": (total - done) / rate if rate else None,
            "message": "",
            "notes": list(self._notes),
            "updated_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            with patience(0):
                files.write_json(join(self.work_uri, PROGRESS_NAME), record | extra)
        except RuntimeError as error:
            self._progress_written_s = time.monotonic() + PROGRESS_PAUSE_S
            log.warning("progress of stage %s was not written: %s", self.stage, error)
