"""What a training loop sees of tracking: five methods, and an object that does nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np


class Tracker(Protocol):
    """Where a loop sends its numbers and pictures. No method blocks but `close`."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers of one step."""
        ...

    def catch_up(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Log what of the rows of an earlier attempt was not delivered; each has its `step`."""
        ...

    def image(self, name: str, image: "np.ndarray", step: int) -> None:
        """Log a picture: uint8, height x width x 3."""
        ...

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Copy a local file to the run's artifacts; it must stay in place until `close`."""
        ...

    def close(self) -> None:
        """Deliver what is left."""
        ...


class NullTracker:
    """Tracks nothing: ranks other than 0, and runs without a tracking address."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Ignore numbers."""

    def catch_up(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Ignore numbers."""

    def image(self, name: str, image: "np.ndarray", step: int) -> None:
        """Ignore a picture."""

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Ignore a file."""

    def close(self) -> None:
        """Nothing is waiting."""
