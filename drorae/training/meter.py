"""What a loop reports of its speed: images per second, share of time waiting for data, memory."""

import resource
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

__all__ = ["Meter", "peak_memory_bytes"]

T = TypeVar("T")


class Meter:
    """Times a loop between two log points."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()
        self._wait_s = 0.0
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
            self._wait_s += time.perf_counter() - asked_s
            yield batch

    def count(self, num_images: int) -> None:
        """Add the images of one finished step."""
        self._images += num_images

    def read(self) -> dict[str, float]:
        """Images per second and data-wait share since the last call; the process's peak memory."""
        elapsed_s = max(time.perf_counter() - self._start_s, 1e-9)
        rates = {
            "speed/images_per_s": self._images / elapsed_s,
            "speed/data_wait_share": self._wait_s / elapsed_s,
            "speed/peak_memory_bytes": float(peak_memory_bytes()),
        }
        self._start_s, self._wait_s, self._images = time.perf_counter(), 0.0, 0
        return rates


def peak_memory_bytes() -> int:
    """Largest GPU allocation, or without a GPU the largest resident size of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
