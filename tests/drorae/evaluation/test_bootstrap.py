import numpy as np
import pytest

from drorae.evaluation.bootstrap import intervals, resample_counts
from drorae.evaluation.reconstruction import METRICS, Reconstructions, summarise


def test_interval_has_the_width_of_the_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=2000)
    found = intervals({"x": values}, replicates=1000)["x"]
    assert found.mean == pytest.approx(values.mean())
    # 2 * 1.96 / sqrt(2000) = .0877; the percentile of 1000 draws is good to a few percent.
    assert found.hi - found.lo == pytest.approx(0.0877, rel=0.1)
    assert found.lo < found.mean < found.hi


def test_paired_difference_is_blind_to_spread_between_images() -> None:
    base = np.random.default_rng(0).normal(scale=100.0, size=500)
    values = {m: dict.fromkeys(METRICS, base + shift) for m, shift in (("rae", 0), ("fusion", 0.5))}
    found = Reconstructions(labels=np.zeros(500), values=values, shown={})
    means, differences = summarise(found, replicates=500, seed=0)
    assert set(means) == {"rae", "fusion"}
    assert differences["fusion-rae"]["psnr"].lo == pytest.approx(0.5)
    assert differences["fusion-rae"]["psnr"].hi == pytest.approx(0.5)
    assert means["rae"]["psnr"].hi - means["rae"]["psnr"].lo > 10


def test_resampling_keeps_class_sizes() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    counts = resample_counts(labels, 6, 50, seed=1)
    assert (counts[:, :3].sum(axis=1) == 3).all()
    assert (counts[:, 5] == 1).all()


def test_same_seed_gives_the_same_interval() -> None:
    values = {"x": np.arange(20.0)}
    assert intervals(values, replicates=300, seed=4) == intervals(values, replicates=300, seed=4)
    assert intervals(values, replicates=300, seed=4) != intervals(values, replicates=300, seed=5)


def test_all_columns_share_their_draws() -> None:
    values = np.random.default_rng(0).normal(size=50)
    found = intervals({"a": values, "b": values}, replicates=200)
    assert found["a"] == found["b"]
    assert found["a"].as_dict()["lo"] == found["a"].lo


@pytest.mark.parametrize("values", [{"a": np.ones(3), "b": np.ones(2)}, {"a": np.ones(0)}])
def test_columns_of_unequal_or_no_length_are_refused(values: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="one length"):
        intervals(values)
