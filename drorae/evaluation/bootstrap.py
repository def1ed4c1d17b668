"""Paired bootstrap intervals over image ids.

Every model and metric is resampled with the same drawn ids, so a difference between two models is a
paired difference and its interval is not widened by the spread between images. Draws are stratified
by class where labels are given.

Source: HiRAE's reporting (within-class resampling, 1000 to 2000 replicates, shared ids, 95 %).
"""

from dataclasses import dataclass

import numpy as np

__all__ = ["Interval", "intervals", "resample_counts"]

CHUNK_REPLICATES = 250  # bounds the count matrix to 250 x N float64


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean with its 95 % percentile interval."""

    mean: float
    lo: float
    hi: float

    def as_dict(self) -> dict[str, float]:
        """For `metrics.json`."""
        return {"mean": self.mean, "lo": self.lo, "hi": self.hi}


def resample_counts(
    labels: np.ndarray | None, num_images: int, replicates: int, seed: int
) -> np.ndarray:
    """How often each image is drawn in each replicate.

    Args:
        labels: Class of each image for within-class resampling, or None for one stratum.
        num_images: Number of images.
        replicates: Rows to draw.
        seed: Same seed, same draws, whatever the metric.

    Returns:
        Counts of shape [replicates, num_images]; each row sums to `num_images`.
    """
    generator = np.random.default_rng(seed)
    counts = np.zeros((replicates, num_images))
    strata = np.zeros(num_images, dtype=np.int64) if labels is None else np.asarray(labels)
    for label in np.unique(strata):
        members = np.flatnonzero(strata == label)
        share = np.full(len(members), 1.0 / len(members))
        counts[:, members] = generator.multinomial(len(members), share, size=replicates)
    return counts


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
    means = _resampled_means(table, labels, replicates, seed)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return {
        name: Interval(mean=float(table[:, i].mean()), lo=float(low[i]), hi=float(high[i]))
        for i, name in enumerate(values)
    }


def _resampled_means(
    table: np.ndarray, labels: np.ndarray | None, replicates: int, seed: int
) -> np.ndarray:
    rows = []
    for start in range(0, replicates, CHUNK_REPLICATES):
        size = min(CHUNK_REPLICATES, replicates - start)
        counts = resample_counts(labels, len(table), size, seed * 1_000_003 + start)
        rows.append(counts @ table / len(table))
    return np.concatenate(rows)
