import numpy as np
import pytest

from drorae.evaluation import frechet
from drorae.evaluation.features import FeatureSet
from drorae.evaluation.frechet import (
    cross_checked,
    distances,
    fit_gaussian,
    frechet_distance,
    reference_of,
)


def features(count: int, dim: int = 8, shift: float = 0.0, seed: int = 0) -> FeatureSet:
    generator = np.random.default_rng(seed)
    pooled = generator.normal(size=(count, dim)) + shift
    logits = generator.normal(size=(count, 5)) * 4
    return FeatureSet(pooled=pooled.astype(np.float32), logits=logits.astype(np.float32))


def test_distance_of_a_set_to_itself_is_zero() -> None:
    gaussian = fit_gaussian(features(100).pooled)
    assert frechet_distance(gaussian, gaussian) == pytest.approx(0.0, abs=1e-9)


def test_distance_of_shifted_copies_is_the_squared_shift() -> None:
    rows = features(100).pooled
    first, second = fit_gaussian(rows), fit_gaussian(rows + np.float32(2.0))
    assert frechet_distance(first, second) == pytest.approx(8 * 4.0, rel=1e-5)


def test_distance_of_scaled_gaussians_is_known() -> None:
    rows = features(500, dim=3).pooled.astype(np.float64)
    rows = rows - rows.mean(axis=0)
    first, second = fit_gaussian(rows), fit_gaussian(3.0 * rows)
    # Equal eigenvectors: sum of (sigma_2 - sigma_1)^2 = 4 tr(S1).
    assert frechet_distance(first, second) == pytest.approx(4.0 * np.trace(first.covariance))


def test_both_forms_agree_when_there_are_fewer_images_than_dimensions() -> None:
    first = fit_gaussian(features(20, dim=60).pooled)
    second = fit_gaussian(features(25, dim=60, shift=0.3, seed=1).pooled)
    value = frechet_distance(first, second)
    assert cross_checked(value, first, second) == pytest.approx(value, rel=1e-4)


def test_broken_linear_algebra_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    gaussian = fit_gaussian(features(100).pooled)
    monkeypatch.setattr(
        frechet, "fid_statistics_to_metric", lambda *_: {"frechet_inception_distance": 20.65}
    )
    with pytest.raises(RuntimeError, match="BLAS"):
        cross_checked(0.0, gaussian, gaussian)


def test_all_metrics_rank_a_near_set_above_a_far_one() -> None:
    real = reference_of(features(200).pooled)
    near = distances(features(150, shift=0.1, seed=1), real, kid_subset=50)
    far = distances(features(150, shift=2.0, seed=2), real, kid_subset=50)
    assert near.fd < far.fd
    assert near.kid < far.kid
    assert near.precision > far.precision
    assert near.recall > far.recall
    assert near.score > 1.0
    assert near.as_dict()["num_images"] == 150
    assert near.fd_torch_fidelity == pytest.approx(near.fd, rel=1e-4)
    skipped = distances(features(150), real, kid_subset=50, cross_check=False)
    assert skipped.fd_torch_fidelity is None


def test_tiny_sets_lower_subset_and_neighbours_instead_of_failing() -> None:
    found = distances(features(3, seed=1), reference_of(features(4).pooled), kid_subset=1000)
    assert np.isfinite(found.kid)


def test_statistics_need_two_rows() -> None:
    with pytest.raises(ValueError, match="at least 2 rows"):
        fit_gaussian(np.zeros((1, 4)))
