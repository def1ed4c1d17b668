from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from drorae.config import Compute
from drorae.data import sample_order
from drorae.training.loop import LoopTools
from drorae.training.world import World

LAYERS, TOKENS, DIM, SIDE, SAMPLES = 3, 4, 16, 8, 24


@dataclass
class MemoryCheckpoints:
    """Keeps states in a dict, through a copy, as a file would."""

    every: int = 1000
    saved: dict[int, dict[str, Any]] = field(default_factory=dict)

    def latest(self) -> dict[str, Any] | None:
        return self.saved[max(self.saved)] if self.saved else None

    def due(self, step: int) -> bool:
        return step % self.every == 0

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


@pytest.fixture
def make_tools() -> Callable[..., LoopTools]:
    def make(
        checkpoints: MemoryCheckpoints | None = None, log: Any = None, **more: Any
    ) -> LoopTools:
        return LoopTools(
            world=World(),
            compute=Compute(log_every_steps=1),
            checkpoints=checkpoints or MemoryCheckpoints(),
            log=log or (lambda row, step: None),
            progress=lambda done, total: None,
            **more,
        )

    return make


@pytest.fixture
def tokenizer_batches() -> Callable[..., Callable[[int], Iterator[Any]]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(SAMPLES, 3, SIDE, SIDE, generator=generator)
    hidden = torch.randn(SAMPLES, LAYERS, TOKENS, DIM, generator=generator)

    def make(num_steps: int, batch: int, seed: int = 0) -> Callable[[int], Iterator[Any]]:
        def batches(start: int) -> Iterator[Any]:
            for step in range(start, num_steps):
                ids = ids_of(step, batch, seed)
                yield SimpleNamespace(
                    step=step, positions=torch.arange(batch), images=images[ids], hidden=hidden[ids]
                )

        return batches

    return make


@pytest.fixture
def latent_batches() -> Callable[..., Callable[[int], Iterator[Any]]]:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(SAMPLES, 8, 2, 2, generator=generator)
    labels = torch.randint(0, 3, (SAMPLES,), generator=generator)

    def make(num_steps: int, batch: int, seed: int = 0) -> Callable[[int], Iterator[Any]]:
        def batches(start: int) -> Iterator[Any]:
            for step in range(start, num_steps):
                ids = ids_of(step, batch, seed)
                yield SimpleNamespace(
                    step=step,
                    positions=torch.arange(batch),
                    latents=latents[ids],
                    labels=labels[ids],
                )

        return batches

    return make


def ids_of(step: int, batch: int, seed: int) -> np.ndarray:
    epoch, inner = sample_order.position(step, SAMPLES, batch)
    return sample_order.batch_ids(seed, epoch, inner, SAMPLES, batch)
