"""Training batches from a start step on, prepared by a thread, with the wait measured.

A batch is a function of (seed, step): a loader that starts at step 1000 gives what one from step 0
gives there, for any number of workers. `crop_batches` cuts a new crop of each image in each epoch,
by (seed, epoch, id); hidden states are then left to the step. `latent_batches` mirrors half of the
latents when the stage stored mirrored ones, likewise.
"""

import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch

from drorae.data import sample_order
from drorae.data.hidden_states import to_unit
from drorae.shapes import Float, Int, Tensor, UInt8

T = TypeVar("T")

PREFETCH_BATCHES = 2
"""Batches prepared ahead of the one in use."""

POLL_S = 0.1
"""How often a blocked loader thread looks whether it should stop."""


@dataclass(frozen=True, slots=True)
class TokenizerBatch:
    """One rank's part of a tokenizer step."""

    step: int
    """Update that this batch feeds, from 0."""
    positions: Int[Tensor, " batch"]
    """Place of each image in the global batch; with `step` it fixes the noise."""
    ids_digest: int
    """CRC-32 of the ids of the whole global batch."""
    ids: np.ndarray
    """Ids of the images, int64."""
    images: Float[Tensor, "batch 3 height width"]
    """Pixels in [0, 1]."""
    labels: Int[Tensor, " batch"]
    """Class of each image."""
    hidden: Float[Tensor, "batch layers tokens dim"] | None
    """Encoder hidden states, float32, deepest layer last; none: the step computes them from
    `images`."""


@dataclass(frozen=True, slots=True)
class LatentBatch:
    """One rank's part of a diffusion step."""

    step: int
    """Update that this batch feeds, from 0."""
    positions: Int[Tensor, " batch"]
    """Place of each latent in the global batch."""
    ids_digest: int
    """CRC-32 of the ids of the whole global batch."""
    ids: np.ndarray
    """Ids of the latents, int64."""
    latents: Float[Tensor, "batch channels height width"]
    """Normalised clean latents, float32."""
    labels: Int[Tensor, " batch"]
    """Class of each image."""


@runtime_checkable
class ImageReader(Protocol):
    """What is needed of `drorae.data.images.ImageShards`."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def read(
        self, ids: np.ndarray
    ) -> tuple[UInt8[Tensor, "batch 3 height width"], Int[Tensor, " batch"]]:
        """Images and labels."""
        ...


@runtime_checkable
class CropReader(Protocol):
    """What is needed of `drorae.data.random_crops.RandomCrops`."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def read(
        self, ids: np.ndarray, epoch: int
    ) -> tuple[UInt8[Tensor, "batch 3 height width"], Int[Tensor, " batch"]]:
        """Crops of that epoch and labels."""
        ...


@runtime_checkable
class HiddenReader(Protocol):
    """What is needed of `drorae.data.hidden_states.HiddenStates`."""

    def read(self, ids: np.ndarray) -> Float[Tensor, "batch layers tokens dim"]:
        """Hidden states."""
        ...


@runtime_checkable
class LatentReader(Protocol):
    """What is needed of `drorae.data.latents.LatentShards`."""

    has_flip: bool

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def read(
        self, ids: np.ndarray, flip: np.ndarray | None = None
    ) -> tuple[Float[Tensor, "batch channels height width"], Int[Tensor, " batch"]]:
        """Normalised latents and labels."""
        ...


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


def tokenizer_batches(
    images: ImageReader,
    hidden: HiddenReader | None,
    *,
    seed: int,
    num_steps: int,
    global_batch: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[TokenizerBatch]:
    """Images and hidden states of one rank.

    Args:
        images: Training images.
        hidden: Hidden states of the same images; none: the step computes them.
        seed: Seed of the sample order.
        num_steps: Steps of the whole training; the last one is `num_steps - 1`.
        global_batch: Images in a step, over all ranks.
        start_step: First step to deliver (continuing a run).
        rank: This worker.
        world_size: Number of workers.

    Raises:
        ValueError: The batch does not fit the data or does not divide over the ranks.
    """
    pick = _Picker(seed, len(images), global_batch, rank, world_size)

    def make(step: int) -> TokenizerBatch:
        place = pick.at(step)
        pixels, labels = images.read(place.ids)
        states = hidden.read(place.ids).to(torch.float32) if hidden is not None else None
        return TokenizerBatch(step, *place[1:], to_unit(pixels), labels, states)

    return _closing(make, start_step, num_steps)


def crop_batches(
    crops: CropReader,
    *,
    seed: int,
    num_steps: int,
    global_batch: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[TokenizerBatch]:
    """Random crops of one rank, new ones in each epoch, without hidden states.

    Args:
        crops: Training images.
        seed: Seed of the sample order.
        num_steps: Steps of the whole training; the last one is `num_steps - 1`.
        global_batch: Images in a step, over all ranks.
        start_step: First step to deliver (continuing a run).
        rank: This worker.
        world_size: Number of workers.

    Raises:
        ValueError: The batch does not fit the data or does not divide over the ranks.
    """
    pick = _Picker(seed, len(crops), global_batch, rank, world_size)

    def make(step: int) -> TokenizerBatch:
        place = pick.at(step)
        pixels, labels = crops.read(place.ids, place.epoch)
        return TokenizerBatch(step, *place[1:], to_unit(pixels), labels, None)

    return _closing(make, start_step, num_steps)


def latent_batches(
    latents: LatentReader,
    *,
    seed: int,
    num_steps: int,
    global_batch: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[LatentBatch]:
    """Normalised latents of one rank; mirrored by a fair coin when the stage stored both views.

    Args:
        latents: Latents of the training images.
        seed: Seed of the sample order and of the coins.
        num_steps: Steps of the whole training; the last one is `num_steps - 1`.
        global_batch: Latents in a step, over all ranks.
        start_step: First step to deliver (continuing a run).
        rank: This worker.
        world_size: Number of workers.

    Raises:
        ValueError: The batch does not fit the data or does not divide over the ranks.
    """
    pick = _Picker(seed, len(latents), global_batch, rank, world_size)

    def make(step: int) -> LatentBatch:
        place = pick.at(step)
        flip = flips(seed, place.epoch, place.ids) if latents.has_flip else None
        values, labels = latents.read(place.ids, flip)
        return LatentBatch(step, *place[1:], values, labels)

    return _closing(make, start_step, num_steps)


class _Place(NamedTuple):
    epoch: int
    positions: Tensor
    """In the global batch."""
    ids_digest: int
    """Of the global batch."""
    ids: np.ndarray
    """Of this rank."""


class _Picker:
    """Which samples one rank uses at a step."""

    def __init__(
        self, seed: int, num_samples: int, global_batch: int, rank: int, world_size: int
    ) -> None:
        self._seed, self._num_samples, self._global_batch = seed, num_samples, global_batch
        sample_order.steps_per_epoch(num_samples, global_batch)
        self._mine = sample_order.rank_slice(np.arange(global_batch), rank, world_size)

    def at(self, step: int) -> _Place:
        sizes = self._num_samples, self._global_batch
        epoch, inner = sample_order.position(step, *sizes)
        ids = sample_order.batch_ids(self._seed, epoch, inner, *sizes)
        digest = zlib.crc32(ids.tobytes())
        return _Place(epoch, torch.from_numpy(self._mine), digest, ids[self._mine])


def _closing(make: Callable[[int], T], start_step: int, num_steps: int) -> Iterator[T]:
    # A generator stops its thread when it is dropped, also after an error in the loop that consumes
    # it.
    with Batches(make, start_step, num_steps) as batches:
        yield from batches


def flips(seed: int, epoch: int, ids: np.ndarray) -> np.ndarray:
    """A fair coin (bool) for each id, by (seed, epoch, id) alone."""
    coins = []
    for number in ids.tolist():
        # The counter makes each draw independent of all others; the order of samples uses counter 0
        # of another key.
        key = np.array([(seed + 1) % 2**64, epoch % 2**64], dtype=np.uint64)
        bits = np.random.Philox(key=key, counter=int(number) + 1).random_raw()
        coins.append(bool(int(bits) >> 63))
    return np.array(coins, dtype=bool)
