"""What people see while stages run: bars on a terminal, log lines otherwise."""

import threading
import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

LINE_EVERY_S = 15.0


class Display(Protocol):
    """Told about every change; called from several threads."""

    def note(self, text: str) -> None:
        """Show one line."""
        ...

    def progress(self, stage: str, progress: dict[str, Any]) -> None:
        """Show the progress record of a running stage (drorae.store.context)."""
        ...

    def started(self, stage: str) -> None:
        """Show that a stage job starts."""
        ...

    def finished(self, stage: str, outcome: str, wall_s: float) -> None:
        """Show how a stage ended."""
        ...

    def close(self) -> None:
        """Give the terminal back."""
        ...


def choose_display(console: Console) -> Display:
    """Return bars for a terminal, lines for anything else."""
    return BarDisplay(console) if console.is_terminal else LineDisplay(console)


def format_duration(seconds: float | None) -> str:
    """Return seconds as `42 s`, `3:05` or `2:03:05`."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def describe_progress(progress: dict[str, Any]) -> str:
    """Return `120/500 steps, 9.8 steps/s, 45.1 images/s, 39 s left, message`."""
    unit, total = progress.get("unit", ""), progress.get("total")
    parts = [] if total is None else [f"{progress.get('done', 0):g}/{total:g} {unit}"]
    if progress.get("rate_per_s"):
        parts.append(f"{progress['rate_per_s']:.1f} {unit}/s")
    if progress.get("images_per_s"):
        parts.append(f"{progress['images_per_s']:.1f} images/s")
    if progress.get("eta_s") is not None:
        parts.append(f"{format_duration(progress['eta_s'])} left")
    if progress.get("message"):
        parts.append(str(progress["message"]))
    return ", ".join(parts)


class LineDisplay:
    """One line per event, and one per running stage every few seconds.

    Args:
        console: Where lines go.
    """

    def __init__(self, console: Console):
        self._console = console
        self._lock = threading.Lock()
        self._next_s: dict[str, float] = {}

    def note(self, text: str) -> None:
        """Print one line."""
        with self._lock:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def started(self, stage: str) -> None:
        """Print that a stage starts."""
        self._next_s[stage] = time.monotonic()
        self.note(f"{stage}: started")

    def progress(self, stage: str, progress: dict[str, Any]) -> None:
        """Print the progress, unless the last line is recent."""
        if time.monotonic() >= self._next_s.get(stage, 0.0):
            self._next_s[stage] = time.monotonic() + LINE_EVERY_S
            self.note(f"{stage}: {describe_progress(progress)}")

    def finished(self, stage: str, outcome: str, wall_s: float) -> None:
        """Print how a stage ended."""
        self.note(f"{stage}: {outcome} ({format_duration(wall_s)})")

    def close(self) -> None:
        """Nothing is held."""


class BarDisplay:
    """A bar for every running stage; finished ones become lines above them.

    Args:
        console: The terminal.
    """

    def __init__(self, console: Console):
        self._bars = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[text]}"),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()
        self._bars.start()

    def note(self, text: str) -> None:
        """Print one line above the bars."""
        self._bars.console.print(text, highlight=False, markup=False)

    def started(self, stage: str) -> None:
        """Add a bar."""
        with self._lock:
            self._tasks[stage] = self._bars.add_task(stage, total=None, text="starting")

    def progress(self, stage: str, progress: dict[str, Any]) -> None:
        """Move the bar."""
        with self._lock:
            if stage in self._tasks:
                self._bars.update(
                    self._tasks[stage],
                    completed=progress.get("done", 0),
                    total=progress.get("total"),
                    text=describe_progress(progress),
                )

    def finished(self, stage: str, outcome: str, wall_s: float) -> None:
        """Replace the bar by a line."""
        with self._lock:
            task = self._tasks.pop(stage, None)
            if task is not None:
                self._bars.remove_task(task)
        self.note(f"{stage:<10} {outcome} ({format_duration(wall_s)})")

    def close(self) -> None:
        """Remove the bars."""
        self._bars.stop()
