"""Items prepared by a thread ahead of their use, with the consumer's wait measured."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

PREFETCH_BATCHES = 2
"""Batches prepared ahead of the one in use."""

POLL_S = 0.1
"""How often a blocked loader thread looks whether it should stop."""


class Batches(Generic[T]):
    """Iterator over prepared batches; use as a context manager, or call `close`.

    Args:
        make: Builds the batch of a step.
        start_step: First step.
        num_steps: End of the steps (exclusive).
        prefetch: Batches kept ready.
    """

    def __init__(
        self,
        make: Callable[[int], T],
        start_step: int,
        num_steps: int,
        prefetch: int = PREFETCH_BATCHES,
    ) -> None:
        self.wait_s = 0.0
        """Seconds that the consumer has waited for batches so far."""
        self._make = make
        self._steps = range(start_step, num_steps)
        self._left = len(self._steps)
        self._ready: queue.Queue[T | BaseException] = queue.Queue(maxsize=max(1, prefetch))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._left == 0 or self._stop.is_set():
            self.close()
            raise StopIteration
        start = time.perf_counter()
        item = self._ready.get()
        self.wait_s += time.perf_counter() - start
        if isinstance(item, BaseException):
            self.close()
            raise item
        self._left -= 1
        return item

    def __enter__(self) -> "Batches[T]":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread; prepared batches are dropped."""
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        for step in self._steps:
            try:
                item: T | BaseException = self._make(step)
            except BaseException as error:  # handed to the consumer, who raises it
                item = error
            if not self._put(item) or isinstance(item, BaseException):
                return

    def _put(self, item: T | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=POLL_S)
            except queue.Full:
                continue
            return True
        return False


def prefetched(make: Callable[[int], T], start_step: int, num_steps: int) -> Iterator[T]:
    """The batches of the steps from `start_step` to `num_steps - 1`, as a generator."""
    # A generator stops its thread when it is dropped, also after an error in the loop that consumes
    # it.
    with Batches(make, start_step, num_steps) as batches:
        yield from batches
