"""Patience with a store that is away: the same request again after growing pauses, for a while.

A server that restarts, or that answers 503 now and then, must not end a stage; one that refuses
access or lacks an object is not asked again. Every request of `files.py` and `versioned.py` goes
through `patiently`; what should fail at once, or had better be skipped than waited for, runs inside
`patience(0)`.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from drorae.store.errors import is_transient

__all__ = ["PATIENCE_S", "is_waiting", "patience", "patiently"]

T = TypeVar("T")

PATIENCE_S = 90.0
"""Seconds for which a store may be away. A server that is restarted is back in 20 s (SeaweedFS,
measured 2026-11-21), one that is moved to another node in about a minute."""

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 8.0

_seconds: ContextVar[float | None] = ContextVar("patience_s", default=None)
# Own generator: that of the module belongs to the training, whose draws must not depend on outages.
_jitter = random.Random()

_waiting: set[int] = set()
"""Threads of this process that wait for a store now."""

log = logging.getLogger(__name__)


def is_waiting() -> bool:
    """Whether any thread of this process waits for a store that is away."""
    return bool(_waiting)


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Wait for at most so long inside the block, in this thread; 0 gives up at the first failure.

    Args:
        seconds: Longest time from the first failure to the last try.
    """
    token = _seconds.set(seconds)
    try:
        yield
    finally:
        _seconds.reset(token)


def patiently(call: Callable[[], T]) -> T:
    """Result of a request, repeated while the store is away and patience lasts.

    Args:
        call: The request; it may be carried out twice when only its answer was lost.

    Raises:
        Exception: What the last try raised; what a repetition cannot cure is raised at once.
    """
    try:
        return _repeated(call)
    finally:
        _waiting.discard(threading.get_ident())


def _repeated(call: Callable[[], T]) -> T:
    first_failure_s = None
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            result = call()
        except Exception as error:
            now_s = time.monotonic()
            if first_failure_s is None:
                first_failure_s = now_s
            left_s = first_failure_s + _allowed_s() - now_s
            if left_s <= 0 or not is_transient(error):
                raise
            _waiting.add(threading.get_ident())
            if pause_s == FIRST_PAUSE_S:
                log.warning("the store is away, asking for %.0f s more: %s", left_s, error)
        else:
            if first_failure_s is not None:
                log.info("the store answered after %.1f s", time.monotonic() - first_failure_s)
            return result
        # Shortened at random, so that many workers do not come back in step.
        time.sleep(min(pause_s * _jitter.uniform(0.5, 1.0), left_s))
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _allowed_s() -> float:
    seconds = _seconds.get()
    return PATIENCE_S if seconds is None else seconds
