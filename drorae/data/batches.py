"""What a training step is given: one rank's part of a global batch, in the host's memory."""

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from drorae.shapes import Float, Int, Tensor, UInt8


@dataclass(frozen=True, slots=True)
class TokenizerBatch:
    """One rank's part of a tokenizer step."""

    step: int
    """Update that this batch feeds, from 0."""
    epoch: int
    """Epoch of the step, from 0."""
    positions: Int[Tensor, " batch"]
    """Place of each image in the global batch; with `step` it fixes the noise."""
    ids_digest: int
    """CRC-32 of the ids of the whole global batch."""
    ids: np.ndarray
    """Ids of the images, int64."""
    images: UInt8[Tensor, "batch 3 height width"]
    """Pixels, 0 to 255."""
    labels: Int[Tensor, " batch"]
    """Class of each image."""
    hidden: Float[Tensor, "batch layers tokens dim"] | None
    """Encoder hidden states, float16, deepest layer last; none: the step computes them from
    `images`."""


@dataclass(frozen=True, slots=True)
class LatentBatch:
    """One rank's part of a diffusion step."""

    step: int
    """Update that this batch feeds, from 0."""
    epoch: int
    """Epoch of the step, from 0."""
    positions: Int[Tensor, " batch"]
    """Place of each latent in the global batch."""
    ids_digest: int
    """CRC-32 of the ids of the whole global batch."""
    ids: np.ndarray
    """Ids of the latents, int64."""
    latents: Float[Tensor, "batch channels height width"]
    """Clean latents as they are stored: float16, not normalised."""
    labels: Int[Tensor, " batch"]
    """Class of each image."""


T = TypeVar("T", TokenizerBatch, LatentBatch)


def pinned(batch: T) -> T:
    """The batch in page-locked memory, from which CUDA copies without blocking."""
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    tensors = {name: v.pin_memory() for name, v in values.items() if isinstance(v, Tensor)}
    return dataclasses.replace(batch, **tensors)
