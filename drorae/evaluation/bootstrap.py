"""Paired bootstrap intervals of means over held-out images.

Every model and metric is resampled with the same draws, so a difference between two models is a
paired difference and its interval is not widened by the spread between images.

What is resampled are the classes, each with all its images: images of a class are alike, so a mean
over many images of few classes is less certain than its number of images suggests, and an interval
that holds the classes fixed says nothing of it (and has no width at all with one image per class).
Where there are no labels, or too few classes to resample, it is the images. The percentiles are
widened for the small number of resampled units, as Student's t is against the normal distribution.
Of 100 intervals 92.5 to 96 held the true mean in a simulation with 1, 2, 5 and 40 images per class,
10 to 100 classes, with and without differences between classes (1,000 data sets each, 500
replicates, 2026-11-25): `tests/benchmarks/interval_coverage.py` prints the table.

HiRAE resamples within classes (1000 to 2000 replicates, shared ids): its intervals are narrower.
"""

from dataclasses import dataclass

import numpy as np
import scipy.stats

__all__ = ["Interval", "intervals"]

CHUNK_REPLICATES = 250
"""Replicates drawn at once, which bounds the matrix of counts to 250 x units float64."""
MIN_CLASSES = 5
"""With fewer classes the images are resampled: four classes say too little of others."""
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    lo: float
    hi: float

    def as_dict(self) -> dict[str, float]:
        """For `metrics.json`."""
        return {"mean": self.mean, "lo": self.lo, "hi": self.hi}


def intervals(
    values: dict[str, np.ndarray],
    *,
    labels: np.ndarray | None = None,
    replicates: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Mean and 95 % interval of each column of per-image values.

    Args:
        values: Per-image values by name, all in the same image order.
        labels: Class of each image, or None.
        replicates: Bootstrap replicates.
        seed: Seed of the draws; shared by all columns.

    Returns:
        Intervals by name. A single image, or images of one value, give an interval of no width.

    Raises:
        ValueError: If the columns are empty or differ in length.
    """
    lengths = {len(v) for v in values.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"bootstrap got columns of lengths {sorted(lengths)}: expected one length above 0; "
            "give every model the same image ids."
        )
    table = np.stack([np.asarray(v, dtype=np.float64) for v in values.values()], axis=1)
    sums, counts = _units(table, labels)
    mean = table.mean(axis=0)
    deviations = _resampled_means(sums, counts, replicates, seed) - mean
    tail = 50.0 * (1.0 - LEVEL)
    low, high = np.percentile(deviations, [tail, 100.0 - tail], axis=0) * _widening(len(counts))
    return {
        name: Interval(mean=float(mean[i]), lo=float(mean[i] + low[i]), hi=float(mean[i] + high[i]))
        for i, name in enumerate(values)
    }


def _units(table: np.ndarray, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums [units, columns] and numbers of images [units] of what is resampled as a whole."""
    numbers = np.arange(len(table))
    if labels is not None and len(np.unique(labels)) >= MIN_CLASSES:
        numbers = np.unique(labels, return_inverse=True)[1]
    counts = np.bincount(numbers)
    sums = np.stack([np.bincount(numbers, weights=column) for column in table.T], axis=1)
    return sums, counts.astype(np.float64)


def _resampled_means(
    sums: np.ndarray, counts: np.ndarray, replicates: int, seed: int
) -> np.ndarray:
    """Means of replicates that draw as many units as there are, with replacement."""
    generator = np.random.default_rng(seed)
    share = np.full(len(counts), 1.0 / len(counts))
    rows = []
    for start in range(0, replicates, CHUNK_REPLICATES):
        size = min(CHUNK_REPLICATES, replicates - start)
        drawn = generator.multinomial(len(counts), share, size=size).astype(np.float64)
        rows.append(drawn @ sums / (drawn @ counts)[:, None])
    return np.concatenate(rows)


def _widening(num_units: int) -> float:
    """Of percentiles: n / (n - 1) in the variance, and Student's t over the normal quantile."""
    if num_units < 2:
        return 1.0
    upper = 0.5 * (1.0 + LEVEL)
    student = scipy.stats.t.ppf(upper, num_units - 1) / scipy.stats.norm.ppf(upper)
    return float(student * np.sqrt(num_units / (num_units - 1)))
