from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loop_fakes import DIM, LAYERS, SAMPLES, SIDE, TOKENS, MemoryCheckpoints, digest_of, ids_of

from drorae.config import Compute
from drorae.training.loop import LoopTools
from drorae.training.world import World


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
    images = torch.randint(256, (SAMPLES, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    hidden = torch.randn(SAMPLES, LAYERS, TOKENS, DIM, generator=generator).half()

    def make(num_steps: int, batch: int, seed: int = 0) -> Callable[[int], Iterator[Any]]:
        def batches(start: int) -> Iterator[Any]:
            for step in range(start, num_steps):
                ids = ids_of(step, batch, seed)
                yield SimpleNamespace(
                    step=step,
                    positions=torch.arange(batch),
                    ids_digest=digest_of(ids),
                    images=images[ids],
                    hidden=hidden[ids],
                )

        return batches

    return make


@pytest.fixture
def latent_batches() -> Callable[..., Callable[[int], Iterator[Any]]]:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(SAMPLES, 8, 2, 2, generator=generator).half()
    labels = torch.randint(0, 3, (SAMPLES,), generator=generator)

    def make(num_steps: int, batch: int, seed: int = 0) -> Callable[[int], Iterator[Any]]:
        def batches(start: int) -> Iterator[Any]:
            for step in range(start, num_steps):
                ids = ids_of(step, batch, seed)
                yield SimpleNamespace(
                    step=step,
                    positions=torch.arange(batch),
                    ids_digest=digest_of(ids),
                    latents=latents[ids],
                    labels=labels[ids],
                )

        return batches

    return make
