"""A limit on how many stage jobs run at once; the longest remaining chain goes first."""

import heapq
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Slots:
    """Places for stage jobs.

    Args:
        num_slots: Jobs at the same time.
    """

    def __init__(self, num_slots: int):
        self._free = num_slots
        self._waiting: list[tuple[int, int]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()

    @contextmanager
    def take(self, chain_length: int) -> Iterator[None]:
        """Wait for a place and hold it.

        Args:
            chain_length: Stages that follow one another from here to the end; the largest is served
                first.
        """
        ticket = (-chain_length, next(self._order))
        with self._changed:
            heapq.heappush(self._waiting, ticket)
            self._changed.wait_for(lambda: self._free > 0 and self._waiting[0] == ticket)
            heapq.heappop(self._waiting)
            self._free -= 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()
