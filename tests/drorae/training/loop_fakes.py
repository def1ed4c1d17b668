import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from drorae.data.order import epoch_ids, position

LAYERS, TOKENS, DIM, SIDE, SAMPLES = 3, 4, 16, 8, 24
STATS = {"mean": torch.zeros(8, 2, 2), "var": torch.ones(8, 2, 2)}
"""Of the latents that the tests make."""


@dataclass
class MemoryCheckpoints:
    """Keeps states in a dict, through a copy, as a file would."""

    every: int = 1000
    saved: dict[int, dict[str, Any]] = field(default_factory=dict)

    def latest(self) -> dict[str, Any] | None:
        return copy_tree(self.saved[max(self.saved)]) if self.saved else None

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def overdue(self) -> bool:
        return False

    def save(self, step: int, state: dict[str, Any]) -> None:
        self.saved[step] = copy_tree(state)


def copy_tree(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: copy_tree(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copy_tree(v) for v in value)
    return value


@dataclass
class Rows:
    """Collects what a loop logs."""

    rows: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def __call__(self, row: dict[str, float], step: int) -> None:
        self.rows.append((step, row))

    def series(self, name: str) -> dict[int, float]:
        return {step: row[name] for step, row in self.rows if name in row}


def digest_of(ids: np.ndarray) -> int:
    return zlib.crc32(ids.tobytes())


def ids_of(step: int, batch: int, seed: int) -> np.ndarray:
    epoch, inner = position(step, SAMPLES, batch)
    return epoch_ids(seed, epoch, (SAMPLES,), batch, 1, 0)[inner]
