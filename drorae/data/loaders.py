"""Training batches from a start step on, prepared ahead by a thread.

A batch is a function of (seed, step): a loader that starts at step 1000 gives what one from step 0
gives there, for any number of workers. `crop_batches` cuts a new crop of each image in each epoch,
by (seed, epoch, id); hidden states are then left to the step. `latent_batches` mirrors half of the
latents when the stage stored mirrored ones, likewise.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, NotRequired, Protocol, TypedDict, TypeVar, Unpack, runtime_checkable

import numpy as np
import torch

from drorae.data import sample_order
from drorae.data.hidden_states import to_unit
from drorae.data.prefetch import prefetched
from drorae.shapes import Float, Int, Tensor, UInt8

T = TypeVar("T")


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


class Order(TypedDict):
    """Which samples, for which steps: the keywords of the three functions below."""

    seed: int
    """Seed of the sample order, and of the coins that mirror latents."""
    num_steps: int
    """Steps of the whole training; the last one is `num_steps - 1`."""
    global_batch: int
    """Samples in a step, over all ranks."""
    start_step: NotRequired[int]
    """First step to deliver (continuing a run); from 0 unless told."""
    rank: NotRequired[int]
    """This worker; 0 unless told."""
    world_size: NotRequired[int]
    """Number of workers; 1 unless told."""


def tokenizer_batches(
    images: ImageReader, hidden: HiddenReader | None, **order: Unpack[Order]
) -> Iterator[TokenizerBatch]:
    """Images and hidden states of one rank.

    Args:
        images: Training images.
        hidden: Hidden states of the same images; none: the step computes them.
        **order: See `Order`.

    Raises:
        ValueError: The batch does not fit the data or does not divide over the ranks.
    """

    def make(place: _Place) -> TokenizerBatch:
        pixels, labels = images.read(place.ids)
        states = hidden.read(place.ids).to(torch.float32) if hidden is not None else None
        return TokenizerBatch(*place[1:], to_unit(pixels), labels, states)

    return _in_order(make, len(images), **order)


def crop_batches(crops: CropReader, **order: Unpack[Order]) -> Iterator[TokenizerBatch]:
    """Random crops of one rank, new ones in each epoch, without hidden states.

    Arguments and errors as `tokenizer_batches`.
    """

    def make(place: _Place) -> TokenizerBatch:
        pixels, labels = crops.read(place.ids, place.epoch)
        return TokenizerBatch(*place[1:], to_unit(pixels), labels, None)

    return _in_order(make, len(crops), **order)


def latent_batches(latents: LatentReader, **order: Unpack[Order]) -> Iterator[LatentBatch]:
    """Normalised latents of one rank; mirrored by a fair coin when the stage stored both views.

    Arguments and errors as `tokenizer_batches`.
    """

    def make(place: _Place) -> LatentBatch:
        flip = flips(order["seed"], place.epoch, place.ids) if latents.has_flip else None
        values, labels = latents.read(place.ids, flip)
        return LatentBatch(*place[1:], values, labels)

    return _in_order(make, len(latents), **order)


class _Place(NamedTuple):
    """The samples of one step; from `step` on, the first fields of a batch."""

    epoch: int
    step: int
    positions: Tensor
    """In the global batch."""
    ids_digest: int
    """Of the global batch."""
    ids: np.ndarray
    """Of this rank."""


def _in_order(
    make: Callable[[_Place], T],
    num_samples: int,
    *,
    seed: int,
    num_steps: int,
    global_batch: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[T]:
    # What is impossible is told here, not by the thread at the first step.
    sample_order.steps_per_epoch(num_samples, global_batch)
    mine = sample_order.rank_slice(np.arange(global_batch), rank, world_size)

    def make_step(step: int) -> T:
        epoch, inner = sample_order.position(step, num_samples, global_batch)
        ids = sample_order.batch_ids(seed, epoch, inner, num_samples, global_batch)
        digest = zlib.crc32(ids.tobytes())
        return make(_Place(epoch, step, torch.from_numpy(mine), digest, ids[mine]))

    return prefetched(make_step, start_step, num_steps)


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
