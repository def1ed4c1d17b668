"""A limit on how many stage jobs run at once; the longest remaining chain goes first."""

import heapq
import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

GATHER_S = 0.3  # stages that became ready together arrive within milliseconds of one another


class Slots:
    """Places for stage jobs.

    Args:
        num_slots: Jobs at the same time.
    """

    def __init__(self, num_slots: int):
        self._free = num_slots
        self._waiting: list[tuple[int, int, int]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()

    @contextmanager
    def take(self, chain_length: int, position: int = 0) -> Iterator[None]:
        """Wait for a place and hold it.

        Args:
            chain_length: Stages that follow one another from here to the end; the largest is served
                first.
            position: Place in the stage table; decides between equal chains.
        """
        ticket = (-chain_length, position, next(self._order))
        with self._changed:
            heapq.heappush(self._waiting, ticket)
        time.sleep(GATHER_S)
        with self._changed:
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
