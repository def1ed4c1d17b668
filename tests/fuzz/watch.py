"""Starts the child of one reader, and starts it again behind an iteration that hung or crashed."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drorae.data.readers.candidates import printable
from tests.fuzz.readers import source_folder

START_S, HANG_S = 180.0, 30.0
"""Longest silence of a child while it imports, and in an iteration, which takes milliseconds."""

MAX_FAILURES = 20
"""Failures of one reader after which it ends."""

# Arenas and pools reserve address space, which is limited.
QUIET = {"MALLOC_ARENA_MAX": "2", "ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"}


@dataclass(slots=True)
class Watch:
    """Fuzzing of one reader."""

    reader: str
    seed: int
    folder: Path
    """Below it lie the sources of the running iteration and of those that failed."""
    stop_s: float
    """Moment of `time.monotonic` at which it ends."""
    iterations: int = 0
    failures: list[str] = field(default_factory=list)

    def run(self, first: int = 0) -> None:
        """Iterate until the time is over or too much has failed."""
        while time.monotonic() < self.stop_s and len(self.failures) < MAX_FAILURES:
            first = self._run_child(first)

    def _run_child(self, first: int) -> int:
        """Number of the iteration to go on with."""
        seconds = self.stop_s - time.monotonic()
        words = (self.reader, self.seed, first, seconds, self.folder)
        # Pillow's libraries write there of every damaged picture.
        with (self.folder / f"{self.reader}.log").open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "tests.fuzz.child", *map(str, words)],
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **QUIET},
            )
        try:
            return self._follow(child, first)
        finally:
            child.kill()
            child.wait()

    def _follow(self, child: subprocess.Popen[bytes], now: int) -> int:
        for line in _lines(child):
            if "begin" in line:
                now = line["begin"]
                self.iterations += 1
            elif "failed" in line:
                self._fail(now, line["reason"])
            if "end" in line or len(self.failures) >= MAX_FAILURES:
                return now + 1
        if child.poll() is None:
            self._fail(now, f"hangs: no end after {HANG_S:.0f} s")
        else:
            self._fail(now, f"crashed: {_ending(child.returncode)}")
        return now + 1

    def _fail(self, iteration: int, reason: str) -> None:
        kept = source_folder(self.folder, self.reader, self.seed, iteration)
        text = f"{self.reader} --seed {self.seed} --first {iteration}: {reason} [{kept}]"
        self.failures.append(text)
        sys.stdout.write(printable(text) + "\n")
        sys.stdout.flush()


def _lines(child: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """Lines of a child until it ends, or is silent for too long."""
    assert child.stdout is not None
    stream, rest, patience_s = child.stdout.fileno(), b"", START_S
    while select.select([stream], [], [], patience_s)[0]:
        patience_s = HANG_S
        data = os.read(stream, 65536)
        if not data:
            child.wait()
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from map(json.loads, lines)


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"
