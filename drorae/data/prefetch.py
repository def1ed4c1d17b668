"""Items made by several threads ahead of their use, given out in order."""

import itertools
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetched(make: Callable[[int], T], steps: range, threads: int) -> Generator[T]:
    """The items of the steps, in their order, as a generator.

    At most twice as many items as threads are held or being made, beside the one in use. An error
    is raised where its item would have been given out. When the generator is closed or dropped,
    items that no thread has begun are never made; the others are waited for.

    Args:
        make: Makes the item of a step; is called by several threads at a time.
        steps: Steps to make items of.
        threads: Number of threads, at least 1.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="batches")
    left = iter(steps)
    try:
        ready = deque(pool.submit(make, step) for step in itertools.islice(left, 2 * threads))
        while ready:
            item = ready.popleft().result()
            ready.extend(pool.submit(make, step) for step in itertools.islice(left, 1))
            yield item
            del item  # else it would live until the next one is there
    finally:
        pool.shutdown(cancel_futures=True)
