"""What waits for MLflow: a bounded queue, emptied in order, a request at a time."""

import logging
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drorae.tracking.limits import MAX_METRICS_PER_BATCH

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

MAX_WAITING_ITEMS = 20_000  # hours of log points at one a second, about 10 MB
MAX_WAITING_IMAGE_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Points:
    """Numbers of one step."""

    values: tuple[tuple[str, float], ...]
    step: int
    timestamp_ms: int


@dataclass(frozen=True, slots=True)
class Picture:
    """uint8, height x width x 3."""

    name: str
    image: "np.ndarray"
    step: int
    timestamp_ms: int


@dataclass(frozen=True, slots=True)
class File:
    """A local file, and the folder of the run's artifacts that it goes to."""

    path: str
    folder: str


@dataclass(frozen=True, slots=True)
class Earlier:
    """Numbers of an earlier attempt, some of which were delivered."""

    rows: tuple[Points, ...]


Item = Points | Picture | File | Earlier


class Outbox:
    """A queue between the loop, which only puts, and one thread, which takes and forgets.

    Args:
        owner: Whose entries these are; stands in warnings.
    """

    def __init__(self, owner: str) -> None:
        self.num_dropped = 0
        """Entries that came when the queue was full or closed."""
        self.is_closed = False
        self._owner = owner
        self._items: deque[Item] = deque()
        self._image_bytes = 0
        self._is_given_up = False
        self._changed = threading.Condition()

    @property
    def num_waiting(self) -> int:
        """Entries that were neither delivered nor refused yet."""
        return len(self._items)

    def put(self, item: Item) -> None:
        """Add an entry, or drop it with one warning for all; never blocks."""
        with self._changed:
            size_bytes = _image_bytes(item)
            too_large = size_bytes and self._image_bytes + size_bytes > MAX_WAITING_IMAGE_BYTES
            if self.is_closed or too_large or len(self._items) >= MAX_WAITING_ITEMS:
                self.num_dropped += 1
                if self.num_dropped == 1:
                    log.warning("%s: queue closed or full, entries are dropped", self._owner)
                return
            self._image_bytes += size_bytes
            self._items.append(item)
            self._changed.notify_all()

    def next_batch(self, gather_s: float) -> list[Item]:
        """The oldest entries that fit one request; empty when closed and drained, or given up.

        Args:
            gather_s: Pause after the first entry, in which more may come.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._items or self.is_closed)
            self._changed.wait_for(lambda: self.is_closed, timeout=gather_s)
            batch: list[Item] = []
            num_points = 0
            for item in () if self._is_given_up else self._items:
                num_points += len(item.values) if isinstance(item, Points) else 0
                if batch and (not isinstance(item, Points) or num_points > MAX_METRICS_PER_BATCH):
                    break
                batch.append(item)
                if not isinstance(item, Points):
                    break
            return batch

    def forget(self, batch: list[Item]) -> None:
        """Remove the entries that `next_batch` gave, delivered or refused."""
        with self._changed:
            for item in batch:
                self._items.popleft()
                self._image_bytes -= _image_bytes(item)

    def close(self) -> None:
        """Take no more entries; those that wait are still given out."""
        with self._changed:
            self.is_closed = True
            self._changed.notify_all()

    def give_up(self) -> None:
        """Give out no more entries, so that the thread ends at its next look."""
        self._is_given_up = True


def _image_bytes(item: Item) -> int:
    return item.image.nbytes if isinstance(item, Picture) else 0
