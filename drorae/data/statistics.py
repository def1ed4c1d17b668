"""Exact streaming mean and variance in float64.

Chan, Golub and LeVeque's pairwise update (Updating Formulae and a Pairwise Algorithm for Computing
Sample Variances, 1979); one value at a time it is Welford's. RAE instead keeps a momentum average
of which only the last 20 to 30 batches matter; these moments are exact, and the same for any split
of the data into shards up to float64 rounding.
"""

from dataclasses import dataclass

import numpy as np


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

    def update(self, samples: np.ndarray) -> "Moments":
        """Moments with a batch [batch, ...] added."""
        if len(samples) == 0:
            return self
        values = np.asarray(samples, dtype=np.float64)
        mean = values.mean(axis=0)
        deviations = values - mean
        return self.merge(
            Moments(
                count=len(values), mean=mean, m2=np.einsum("i...,i...->...", deviations, deviations)
            )
        )

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
