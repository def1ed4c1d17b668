"""What a loop reports of its speed: images per second, shares of waiting and of work, memory."""

import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["Meter", "peak_memory_bytes"]

T = TypeVar("T")


class Meter:
    """Times a loop's thread between two log points.

    Its time is waiting for a batch, waiting for the device, or its own work (`host`), which is what
    is left: launching, bookkeeping, logging, evaluations, and on a CPU the arithmetic. The device
    is waited for at log points only, so that wait is how far the host was ahead there: a share near
    0 says that the device waits for the host or for data. Costs two clock readings a step. (A host
    that is ahead by more launches than CUDA queues, about 1,000, waits inside of a launch, which
    counts as its work.)
    """

    def __init__(self) -> None:
        self._start_s = time.perf_counter()
        self._data_s = self._device_s = 0.0
        self._images = 0

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Pass batches on and add up how long the loop waits for each."""
        iterator = iter(batches)
        while True:
            asked_s = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._data_s += time.perf_counter() - asked_s
            yield batch

    @contextmanager
    def waiting_for_device(self) -> Iterator[None]:
        """Around what reads from the device at a log point."""
        started_s = time.perf_counter()
        yield
        self._device_s += time.perf_counter() - started_s

    def count(self, num_images: int) -> None:
        """Add the images of one finished step."""
        self._images += num_images

    def read(self) -> dict[str, float]:
        """Rate and shares of the time since the last call; the process's peak memory."""
        elapsed_s = max(time.perf_counter() - self._start_s, 1e-9)
        host_s = max(elapsed_s - self._data_s - self._device_s, 0.0)
        rates = {
            "speed/images_per_s": self._images / elapsed_s,
            "speed/data_wait_share": self._data_s / elapsed_s,
            "speed/host_share": host_s / elapsed_s,
            "speed/peak_memory_bytes": float(peak_memory_bytes()),
        }
        self._start_s, self._images = time.perf_counter(), 0
        self._data_s = self._device_s = 0.0
        return rates


def peak_memory_bytes() -> int:
    """Largest GPU allocation, or without a GPU the largest resident size of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
