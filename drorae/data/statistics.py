"""Exact streaming mean and variance in float64.

Chan, Golub and LeVeque's pairwise update (Updating Formulae and a Pairwise Algorithm for Computing
Sample Variances, 1979); one value at a time it is Welford's. RAE instead keeps a momentum average
of which only the last 20 to 30 batches matter; these moments are exact, and the same for any split
of the data into shards up to float64 rounding.
"""

from dataclasses import dataclass

import numpy as np
import torch

from drorae.shapes import Float, Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations of everything seen so far."""

    count: int
    """Number of samples."""
    mean: np.ndarray
    """Mean over samples, float64, the shape of one sample."""
    m2: np.ndarray
    """Sum over samples of (value - mean)^2, float64, the shape of one sample."""

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> "Moments":
        """Moments of no sample."""
        return cls(count=0, mean=np.zeros(shape), m2=np.zeros(shape))

    @property
    def var(self) -> np.ndarray:
        """Population variance (divided by the count), float64.

        Raises:
            ValueError: There is no sample.
        """
        if self.count == 0:
            raise ValueError("variance of 0 samples is undefined: expected at least one sample.")
        return self.m2 / self.count

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both data sets together.

        Raises:
            ValueError: The sample shapes differ.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"moments of shape {self.mean.shape} and {other.mean.shape} cannot be merged: "
                "expected one sample shape."
            )
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta**2 * (self.count * other.count / count)
        return Moments(count=count, mean=mean, m2=m2)


class RunningMoments:
    """Moments of batches on their device, float64.

    Args:
        shape: Shape of one sample.
        device: Where the batches are.
    """

    CHUNK = 64
    """Samples that are worked on at a time: float64 copies of no more are made."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._count = 0
        self._mean = torch.zeros(shape, dtype=torch.float64, device=device)
        self._m2 = torch.zeros_like(self._mean)

    def update(self, samples: Float[Tensor, "batch ..."]) -> None:
        """Add a batch."""
        for chunk in samples.split(self.CHUNK) if len(samples) else ():
            values = chunk.to(torch.float64)
            mean = values.mean(dim=0)
            count = self._count + len(values)
            delta = mean - self._mean
            self._mean += delta * (len(values) / count)
            self._m2 += (values - mean).square().sum(dim=0)
            self._m2 += delta.square() * (self._count * len(values) / count)
            self._count = count

    def result(self) -> Moments:
        """Moments of all batches so far."""
        return Moments(count=self._count, mean=self._mean.cpu().numpy(), m2=self._m2.cpu().numpy())
