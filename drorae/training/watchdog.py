"""A watchdog in every rank: a loop that stands still ends its process and names who held it up.

Ray notices a process that died and one that answers nothing (stopped, frozen machine), but not a
live one whose loop does not advance: a read that never returns, or a rank that waits for such a
one. The loop touches the watchdog through its batches (`watched`). Each rank tells the others where
it is in a small file beside the checkpoints, so this works over several machines without a further
service; it costs one small write per rank a tenth of the limit, 9 s by default.

The limit is a number of seconds, or a number of typical steps of this run if those take longer. Not
judged by it are the first step, which may compile for minutes, and what the loop announces as long
(`unhurried`: evaluation, checkpoint): its own rank has another limit there, and the other ranks,
which then wait for it in a collective, see in its report that it is at work. A download on which a
batch waits is such work as long as its bytes arrive. A store that is away delays batches and
reports alike, and is waited for as long as its requests wait.
"""

import logging
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from drorae.config import from_json, to_json
from drorae.store import arrivals, files, patience

__all__ = ["RankReport", "Watchdog", "read_reports", "report_uri", "unhurried", "watched"]

T = TypeVar("T")

REPORTS_PER_TIMEOUT = 10
REPORT_EVERY_S = (1.0, 30.0)
TYPICAL_STEPS = 20
"""Steps of the usual length that may pass without a batch."""
STEPS_MEASURED = 50
"""Last steps of which the median is the usual length: one that waited long does not count."""
EXIT_CODE = 70

end_process = os._exit
CURRENT: ContextVar["Watchdog | None"] = ContextVar("watchdog", default=None)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankReport:
    """Where a rank is, as it last told."""

    rank: int
    """Which rank."""
    host: str
    """Its machine, for messages."""
    pid: int
    """Its process."""
    batches: int
    """Batches that its loop has taken since this group of workers started."""
    number: int
    """Raised by every report: one that stays the same is that of a silent process."""
    busy: str = ""
    """What it announced to take long and is at now; usually empty."""
    where: str
    """Innermost line of our own code that its loop was in."""

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.pid})"


class Watchdog:
    """Watches the loop of this rank; use as a context manager around the training function.

    Args:
        folder_uri: Where the ranks of this group of workers report.
        rank: This rank.
        world_size: Number of ranks that report there.
        timeout_s: Longest time between two batches.
        long_timeout_s: Longest time inside of `unhurried`.
        on_hang: Receives the message before this process ends.
    """

    def __init__(
        self,
        folder_uri: str,
        rank: int,
        world_size: int,
        timeout_s: float,
        long_timeout_s: float,
        on_hang: Callable[[int, str], None],
    ) -> None:
        self._folder_uri = folder_uri
        self._rank, self._world_size = rank, world_size
        self._timeout_s, self._long_timeout_s = timeout_s, long_timeout_s
        self._on_hang = on_hang
        low, high = REPORT_EVERY_S
        self.every_s = min(max(timeout_s / REPORTS_PER_TIMEOUT, low), high)
        self._batches, self._number = 0, 0
        self._last_s: float | None = None
        self._steps_s: deque[float] = deque(maxlen=STEPS_MEASURED)
        self._typical_s = 0.0
        self._busy = ""
        self._excused_s = 0.0
        self._loop_thread = threading.get_ident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._token = CURRENT.set(self)
        self._report()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        CURRENT.reset(self._token)
        self._stop.set()
        self._thread.join()

    def follow(self, batches: Iterator[T]) -> Iterator[T]:
        """Pass batches on; between the second and the last one the loop has to advance."""
        self._loop_thread = threading.get_ident()
        try:
            for batch in batches:
                self._batches += 1
                self._note_step()
                yield batch
        finally:
            self._last_s = None

    def _note_step(self) -> None:
        now_s = time.monotonic()
        if self._last_s is not None:
            self._steps_s.append(now_s - self._last_s)
            self._typical_s = statistics.median_low(self._steps_s)
        self._last_s = now_s if self._batches > 1 else None

    @contextmanager
    def unhurried(self, why: str) -> Iterator[None]:
        """Allow the loop what takes longer than a step."""
        armed, outer = self._last_s is not None, self._busy
        self._busy, self._last_s = why, time.monotonic() if armed else None
        try:
            yield
        finally:
            self._busy, self._last_s = outer, time.monotonic() if armed else None

    def _watch(self) -> None:
        while not self._stop.wait(self.every_s):
            self._report()
            if self._late_s() > 0 and (told := self._explain()):
                log.error("%s", told[1])
                self._on_hang(*told)
                # The loop hangs in a call that no exception reaches; Ray restarts the group.
                end_process(EXIT_CODE)
                return

    def _late_s(self) -> float:
        """By how much the loop exceeds its limit; negative within it."""
        last_s = self._last_s
        if last_s is None:
            return -1.0
        return time.monotonic() - max(last_s, self._excused_s) - self._limit_s()

    def _limit_s(self) -> float:
        limit_s = max(self._timeout_s, TYPICAL_STEPS * self._typical_s)
        return max(limit_s, self._long_timeout_s) if self._busy else limit_s

    def _explain(self) -> tuple[int, str] | None:
        """Who holds the group up and what to say; None if the loop went on after all."""
        before = read_reports(self._folder_uri, self._world_size)
        if self._stop.wait(1.2 * self.every_s):
            return None
        can_report = self._report()
        reports = read_reports(self._folder_uri, self._world_size) | {self._rank: self._own()}
        silent = [r for r, report in reports.items() if before.get(r) == report]
        if self._is_excused(reports, silent, can_report):
            return None
        fewest = min(report.batches for report in reports.values())
        slowest = [r for r, report in reports.items() if report.batches == fewest]
        culprit = (silent or slowest)[0]
        state = "does not answer" if silent else f"stands still in {reports[culprit].where}"
        return culprit, (
            f"no training step was finished for {self._limit_s():.3g} s: {reports[culprit]} "
            f"{state} after {reports[culprit].batches} batches; expected a batch at least every "
            "compute.hang_timeout_s. See that process and its disk, or raise the limit."
        )

    def _is_excused(
        self, reports: dict[int, RankReport], silent: list[int], can_report: bool
    ) -> bool:
        """Whether the loop went on after all, or waits for what has a limit of its own."""
        late_s = self._late_s()
        others = [r for r in reports if r not in (self._rank, *silent)]
        is_busy = arrivals.is_arriving() or any(reports[rank].busy for rank in others)
        if late_s > 0 and is_busy:
            # Once it is done there, this rank may wait for its step as long as for any other.
            self._excused_s = time.monotonic()
            return True
        store_is_away = patience.is_waiting() or not can_report
        return late_s <= 0 or (store_is_away and late_s <= patience.PATIENCE_S)

    def _own(self) -> RankReport:
        return RankReport(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            batches=self._batches,
            number=self._number,
            busy=self._busy or _waits_for(),
            where=_innermost(self._loop_thread),
        )

    def _report(self) -> bool:
        """Tell the others; whether that worked."""
        self._number += 1
        try:
            with patience.patience(0):
                files.write_json(report_uri(self._folder_uri, self._rank), to_json(self._own()))
        except RuntimeError as error:
            log.warning("rank %d could not report: %s", self._rank, error)
            return False
        return True


def _waits_for() -> str:
    """What delays the batches of this process; empty: nothing known."""
    if patience.is_waiting():
        return "waiting for the store"
    return "waiting for a download" if arrivals.is_arriving() else ""


def watched(batches: Callable[[int], Iterator[T]]) -> Callable[[int], Iterator[T]]:
    """The same batches; a loop that takes them is watched if this process has a watchdog."""
    watchdog = CURRENT.get()
    if watchdog is None:
        return batches
    return lambda start: watchdog.follow(batches(start))


@contextmanager
def unhurried(why: str) -> Iterator[None]:
    """What a loop does beside its steps, known to take long on this rank; no limit is set by it.

    Args:
        why: For messages.
    """
    watchdog = CURRENT.get()
    with nullcontext() if watchdog is None else watchdog.unhurried(why):
        yield


def report_uri(folder_uri: str, rank: int) -> str:
    """Where a rank reports."""
    return files.join(folder_uri, f"rank-{rank}.json")


def read_reports(folder_uri: str, world_size: int) -> dict[int, RankReport]:
    """What the ranks last told; one that never reported is missing."""
    found: dict[int, RankReport] = {}
    for rank in range(world_size):
        try:
            with patience.patience(0):
                report = files.read_json(report_uri(folder_uri, rank))
        except (FileNotFoundError, RuntimeError, ValueError):
            continue
        found[rank] = from_json(RankReport, report)
    return found


def _innermost(thread: int) -> str:
    """Innermost frame of a thread in this project, else its innermost frame, as file:line."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "no loop"
    stack = traceback.extract_stack(frame)
    ours = [line for line in stack if "drorae" in line.filename.split(os.sep)] or stack
    path = "/".join(ours[-1].filename.split(os.sep)[-3:])
    return f"{path}:{ours[-1].lineno} ({ours[-1].name})"
