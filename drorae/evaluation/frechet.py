"""Distances between feature sets: Frechet, KID, precision and recall, Inception-like score.

KID and the score come from torch-fidelity's functions, applied to features that were computed once;
precision and recall from `neighbours`, in bounded memory. For the Frechet distance torch-fidelity
takes the eigenvalues of a non-symmetric product, several times slower and a place where BLAS and
SciPy builds have been wrong. Here it comes from a symmetric eigendecomposition in float64, and
torch-fidelity's value is the cross-check that must agree, once per evaluation. With fewer images
than feature dimensions the covariances are singular and the distance is biased upwards: compare
only sets of equal size.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from drorae.evaluation.features import FeatureSet
from drorae.evaluation.neighbours import neighbour_radii, precision_and_recall

__all__ = [
    "Gaussian",
    "Reference",
    "SetMetrics",
    "cross_checked",
    "distances",
    "fit_gaussian",
    "frechet_distance",
    "reference_of",
    "symmetric_root",
]

AGREEMENT = 1e-3
"""Largest allowed difference of the two Frechet computations, relative to the scale of the traces.

Square roots of the near-zero eigenvalues of a singular product amplify float64 rounding (1e-16) to
1e-8 each."""
NUM_KID_SUBSETS = 50
PRC_NEIGHBOURS = 3  # Kynkaanniemi et al. 2019
BLOCK_ROWS = 4096  # 64 MB of float64 at 2,048 dimensions


@dataclass(frozen=True, kw_only=True, slots=True)
class Gaussian:
    """Mean and covariance of one set of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The photos that every set is compared with; what is needed of them, computed once."""

    pooled: np.ndarray
    """Features, float32 [N, D]."""
    gaussian: Gaussian
    """Their mean and covariance."""
    root: np.ndarray
    """Square root of the covariance."""
    radii: np.ndarray
    """Distance of each to its third neighbour, float32 [N]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SetMetrics:
    """Everything measured between one set of images and the reference set."""

    fd: float
    """Frechet distance, symmetric form in float64."""
    fd_torch_fidelity: float | None
    """The same by torch-fidelity, where the cross-check was asked for."""
    kid: float
    """Mean squared MMD over subsets, cubic kernel."""
    kid_std: float
    """Standard deviation over the subsets."""
    precision: float
    """Share of the set inside the reference manifold (3 neighbours)."""
    recall: float
    """Share of the reference inside the set's manifold (3 neighbours)."""
    score: float
    """exp of the mean KL of class posteriors: the Inception Score formula with this extractor's
    classifier."""
    num_images: int
    """Images in the set."""

    def as_dict(self) -> dict[str, float | None]:
        """For `metrics.json`."""
        return {name: getattr(self, name) for name in self.__slots__}


def fit_gaussian(features: np.ndarray) -> Gaussian:
    """Mean and covariance in float64, a block of rows at a time.

    Raises:
        ValueError: With fewer than two rows.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(
            f"Frechet statistics got shape {features.shape}: expected at least 2 rows."
        )
    mean = features.mean(axis=0, dtype=np.float64)
    total = np.zeros((features.shape[1],) * 2)
    for start in range(0, len(features), BLOCK_ROWS):
        centred = features[start : start + BLOCK_ROWS] - mean
        total += centred.T @ centred
    return Gaussian(mean=mean, covariance=total / (len(features) - 1))


def reference_of(pooled: np.ndarray, device: torch.device | str = "cpu") -> Reference:
    """Everything about the reference photos that does not depend on what is compared with them."""
    gaussian = fit_gaussian(pooled)
    return Reference(
        pooled=pooled,
        gaussian=gaussian,
        root=symmetric_root(gaussian.covariance),
        radii=neighbour_radii(pooled, _neighbours(pooled), device),
    )


def symmetric_root(covariance: np.ndarray) -> np.ndarray:
    """Square root of a covariance by eigh, negative rounding clipped at 0."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T


def frechet_distance(
    first: Gaussian, second: Gaussian, second_root: np.ndarray | None = None
) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S2^(1/2) S1 S2^(1/2))^(1/2)), eigenvalues clipped at 0.

    Args:
        first: One set.
        second: The other, usually the reference.
        second_root: `symmetric_root(second.covariance)` when it is already known.
    """
    root = symmetric_root(second.covariance) if second_root is None else second_root
    inner = root @ first.covariance @ root
    overlap = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2.0).clip(min=0.0)).sum()
    difference = first.mean - second.mean
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return max(float(difference @ difference + traces - 2.0 * overlap), 0.0)


def cross_checked(value: float, first: Gaussian, second: Gaussian) -> float:
    """Torch-fidelity's distance, after comparing it with `value`.

    Raises:
        RuntimeError: If the two disagree: the linear algebra library is broken.
    """
    other = fid_statistics_to_metric(
        {"mu": first.mean, "sigma": first.covariance},
        {"mu": second.mean, "sigma": second.covariance},
        False,
    )["frechet_inception_distance"]
    scale = np.trace(first.covariance) + np.trace(second.covariance)
    if not np.isfinite(other) or abs(value - other) > AGREEMENT * max(float(scale), 1e-12):
        raise RuntimeError(
            f"Frechet distance is {value:.6g} from the symmetric form but {other:.6g} from "
            "torch-fidelity: expected agreement; the BLAS/LAPACK of this NumPy is wrong, install "
            "another build."
        )
    return float(other)


def distances(
    samples: FeatureSet,
    reference: Reference,
    *,
    kid_subset: int,
    isc_splits: int = 10,
    cross_check: bool = True,
    device: torch.device | str = "cpu",
) -> SetMetrics:
    """Compare a set of images with the reference set.

    Beside both sets' features it needs 300 MB at 2,048 dimensions, and 24 bytes a logit for the
    score; time grows with images of the set times images of both.

    Args:
        samples: Features of generated or reconstructed images.
        reference: The reference photos.
        kid_subset: Images per KID subset; cut to the smaller set.
        isc_splits: Splits of the score; cut so that a split has at least 2 images.
        cross_check: Compare the Frechet distance with torch-fidelity's.
        device: Where neighbours are searched.
    """
    gaussian, target = fit_gaussian(samples.pooled), reference.gaussian
    fd = frechet_distance(gaussian, target, reference.root)
    count = len(samples.pooled)
    kid = kid_features_to_metric(
        torch.from_numpy(samples.pooled),
        torch.from_numpy(reference.pooled),
        kid_subsets=NUM_KID_SUBSETS,
        kid_subset_size=min(kid_subset, count, len(reference.pooled)),
        verbose=False,
    )
    precision, recall = precision_and_recall(
        samples.pooled,
        neighbour_radii(samples.pooled, _neighbours(samples.pooled), device),
        reference.pooled,
        reference.radii,
        device,
    )
    splits = max(1, min(isc_splits, count // 2))
    score = isc_features_to_metric(torch.from_numpy(samples.logits), splits)
    return SetMetrics(
        fd=fd,
        fd_torch_fidelity=cross_checked(fd, gaussian, target) if cross_check else None,
        kid=kid["kernel_inception_distance_mean"],
        kid_std=kid["kernel_inception_distance_std"],
        precision=precision,
        recall=recall,
        score=score["inception_score_mean"],
        num_images=count,
    )


def _neighbours(features: np.ndarray) -> int:
    return max(1, min(PRC_NEIGHBOURS, len(features) - 1))
