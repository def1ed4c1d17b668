"""Training batches from a start step on, prepared ahead by threads.

A batch is a function of (seed, step): a loader that starts at step 1000 gives what one from step 0
gives there, for any number of workers. `crop_batches` cuts a new crop of each image in each epoch,
by (seed, epoch, id); hidden states are then left to the step. `latent_batches` mirrors half of the
latents when the stage stored mirrored ones, likewise. Batches hold numbers as they are stored
(uint8, float16) in the memory of the host: the loop turns them into float32 on its device.
"""

import contextlib
import functools
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import NamedTuple, NotRequired, Protocol, TypedDict, TypeVar, Unpack, runtime_checkable

import numpy as np
import torch

from drorae.data.batches import LatentBatch, TokenizerBatch, pinned
from drorae.data.draws import host_uniform
from drorae.data.jobs import OrderConfig
from drorae.data.order import (
    ShardUse,
    check_streams,
    epoch_ids,
    node_plan,
    position,
    rank_slice,
    steps_per_epoch,
)
from drorae.data.prefetch import prefetched
from drorae.shapes import Float, Int, Tensor, UInt8

T = TypeVar("T", TokenizerBatch, LatentBatch)

FLIP_STREAM = "latents/flip"
ANY_SET = OrderConfig()


class Shards(Protocol):
    """What is needed of every reader; its methods are called by several threads at a time."""

    @property
    def shard_rows(self) -> tuple[int, ...]:
        """Rows of each shard."""
        ...

    def follow(self, uses: Iterable[ShardUse]) -> None:
        """Fetch shards in this order, which is worked out as it is read, until the next call."""
        ...

    def reached(self, step: int) -> None:
        """Shards whose last step lies before this one may go."""
        ...


@runtime_checkable
class ImageReader(Shards, Protocol):
    """What is needed of `drorae.data.images.ImageShards`."""

    def read(
        self, ids: np.ndarray
    ) -> tuple[UInt8[Tensor, "batch 3 height width"], Int[Tensor, " batch"]]:
        """Images and labels."""
        ...


@runtime_checkable
class CropReader(Shards, Protocol):
    """What is needed of `drorae.data.random_crops.RandomCrops`."""

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
class LatentReader(Shards, Protocol):
    """What is needed of `drorae.data.latent_shards.LatentShards`."""

    has_flip: bool
    shape: tuple[int, int, int]

    def read(
        self,
        ids: np.ndarray,
        flip: np.ndarray | None = None,
        out: Float[Tensor, "batch channels height width"] | None = None,
    ) -> tuple[Float[Tensor, "batch channels height width"], Int[Tensor, " batch"]]:
        """Latents as stored, in `out` if that is given, and labels."""
        ...


class Delivery(TypedDict):
    """Which samples, for which steps, and how: the keywords of the three functions below."""

    seed: int
    """Seed of the sample order, and of the coins that mirror latents."""
    num_steps: int
    """Steps of the whole training; the last one is `num_steps - 1`."""
    global_batch: int
    """Samples in a step, over all ranks."""
    order: NotRequired[OrderConfig]
    """How the samples of an epoch are shuffled; uniformly unless given."""
    rank: NotRequired[int]
    """This worker; 0 unless given."""
    world_size: NotRequired[int]
    """Number of workers; 1 unless given."""
    threads: NotRequired[int]
    """Threads that prepare batches, one batch each; 1 unless given."""
    pin: NotRequired[bool]
    """Put batches into page-locked memory, from which CUDA copies without blocking."""


def tokenizer_batches(
    images: ImageReader,
    hidden: HiddenReader | None,
    *,
    start_step: int = 0,
    **delivery: Unpack[Delivery],
) -> Iterator[TokenizerBatch]:
    """Images and hidden states of one rank.

    Args:
        images: Training images.
        hidden: Hidden states of the same images; none: the step computes them.
        start_step: First step to deliver (continuing a run).
        **delivery: See `Delivery`.

    Raises:
        ValueError: The batch does not fit the data, or does not divide over the ranks or streams.
    """

    def make(place: _Place) -> TokenizerBatch:
        pixels, labels = images.read(place.ids)
        states = hidden.read(place.ids) if hidden is not None else None
        return TokenizerBatch(*place, pixels, labels, states)

    return _in_order(make, images, start_step, **delivery)


def crop_batches(
    crops: CropReader, *, start_step: int = 0, **delivery: Unpack[Delivery]
) -> Iterator[TokenizerBatch]:
    """Random crops of one rank, new ones in each epoch, without hidden states.

    Arguments and errors as `tokenizer_batches`.
    """

    def make(place: _Place) -> TokenizerBatch:
        return TokenizerBatch(*place, *crops.read(place.ids, place.epoch), None)

    return _in_order(make, crops, start_step, **delivery)


def latent_batches(
    latents: LatentReader, *, start_step: int = 0, **delivery: Unpack[Delivery]
) -> Iterator[LatentBatch]:
    """Stored latents of one rank; mirrored by a fair coin when the stage stored both views.

    Arguments and errors as `tokenizer_batches`.
    """

    def make(place: _Place) -> LatentBatch:
        flip = flips(delivery["seed"], place.epoch, place.ids) if latents.has_flip else None
        shape = (len(place.ids), *latents.shape)
        # torch keeps page-locked memory and gives it out again
        out = torch.empty(shape, dtype=torch.half, pin_memory=True) if delivery.get("pin") else None
        return LatentBatch(*place, *latents.read(place.ids, flip, out))

    return _in_order(make, latents, start_step, **delivery)


def flips(seed: int, epoch: int, ids: np.ndarray) -> np.ndarray:
    """A fair coin (bool) for each id, by (seed, epoch, id) alone."""
    return host_uniform(seed, FLIP_STREAM, epoch, ids, 1)[:, 0] < 0.5


class _Place(NamedTuple):
    """The samples of one step: the first fields of a batch."""

    step: int
    epoch: int
    positions: Tensor
    """In the global batch."""
    ids_digest: int
    """Of the global batch."""
    ids: np.ndarray
    """Of this rank."""


def _in_order(
    make: Callable[[_Place], T],
    shards: Shards,
    start_step: int,
    *,
    seed: int,
    num_steps: int,
    global_batch: int,
    order: OrderConfig = ANY_SET,
    rank: int = 0,
    world_size: int = 1,
    threads: int = 1,
    pin: bool = False,
) -> Iterator[T]:
    # What is impossible is told here, not by a thread at the first step.
    rows = shards.shard_rows
    steps_per_epoch(sum(rows), global_batch)
    check_streams(global_batch, order.streams)
    mine = rank_slice(np.arange(global_batch), rank, world_size)
    layout = (rows, global_batch, order.streams, order.window_shards)
    lock = threading.Lock()

    @functools.lru_cache(maxsize=2)  # threads may have begun the next epoch
    def ids_of(epoch: int) -> np.ndarray:
        return epoch_ids(seed, epoch, *layout)

    def make_step(step: int) -> T:
        epoch, inner = position(step, sum(rows), global_batch)
        with lock:
            ids = ids_of(epoch)[inner]
        digest = zlib.crc32(ids.tobytes())
        batch = make(_Place(step, epoch, torch.from_numpy(mine), digest, ids[mine]))
        return pinned(batch) if pin else batch

    steps = range(start_step, num_steps)
    plan = node_plan(seed, *layout, positions=range(int(mine[0]), int(mine[-1]) + 1), steps=steps)
    return _followed(prefetched(make_step, steps, threads), shards, plan)


def _followed(batches: Generator[T], shards: Shards, plan: Iterator[ShardUse]) -> Iterator[T]:
    shards.follow(plan)
    try:
        with contextlib.closing(batches):
            for batch in batches:
                shards.reached(batch.step)
                yield batch
    finally:
        shards.follow(())
