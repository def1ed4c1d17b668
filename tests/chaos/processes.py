"""Processes of this machine by number: parents, children, names, and their end."""

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def parent_of(pid: int) -> int:
    """Parent of a process; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[1])


def is_alive(pid: int) -> bool:
    """Whether a process exists and has not ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def all_pids() -> list[int]:
    """Every process of this machine."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def command_of(pid: int) -> str:
    """Command line of a process; empty when it is gone."""
    with suppress(OSError):
        return (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        )
    return ""


def descendants(pid: int) -> list[int]:
    """Children of a process, and theirs."""
    children: dict[int, list[int]] = {}
    for other in all_pids():
        children.setdefault(parent_of(other), []).append(other)
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def with_command(words: str, among: Iterable[int]) -> list[int]:
    """Processes whose command line contains the words."""
    return [pid for pid in among if words in command_of(pid)]


def with_variable(assignment: str, among: Iterable[int]) -> list[int]:
    """Processes that were started with this variable in their environment."""
    found = []
    for pid in among:
        with suppress(OSError):
            if assignment.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def end_all(pids: Iterable[int], grace_s: float = 5.0) -> None:
    """Wait a little for processes to end by themselves, then kill the others."""
    left = list(pids)
    deadline_s = time.monotonic() + grace_s
    while left and time.monotonic() < deadline_s:
        left = [pid for pid in left if is_alive(pid)]
        time.sleep(0.1)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
