"""Whether this process waits for bytes that arrive: a slow transfer is work and no hang.

Who waits for a transfer says so (`awaited`), and who receives bytes notes it (`note`); a watchdog
asks. The answer is one of the process: a thread that prepares batches waits for what other threads
bring.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["STALLED_S", "awaited", "is_arriving", "note"]

STALLED_S = 20.0
"""Seconds without a byte after which a transfer does not count as advancing."""

_waiting: set[int] = set()
"""Threads that wait for a transfer now."""
_last_s = float("-inf")
"""When the last awaited bytes arrived, by the monotonic clock."""


@contextmanager
def awaited() -> Iterator[None]:
    """Inside the block this thread waits for a transfer."""
    _waiting.add(threading.get_ident())
    try:
        yield
    finally:
        _waiting.discard(threading.get_ident())


def note() -> None:
    """Bytes have arrived."""
    global _last_s
    if _waiting:
        _last_s = time.monotonic()


def is_arriving() -> bool:
    """Whether bytes for which a thread waited arrived in the last `STALLED_S` seconds.

    True between two transfers of one wait too, so that nobody who asks hits the gap.
    """
    return time.monotonic() - _last_s <= STALLED_S
