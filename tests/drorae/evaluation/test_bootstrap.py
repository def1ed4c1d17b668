import numpy as np
import pytest

from drorae.evaluation.bootstrap import intervals, paired_differences
from tests.benchmarks.interval_coverage import coverage


def test_interval_has_the_width_of_the_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=2000)
    found = intervals({"x": values}, replicates=1000)["x"]
    assert found.mean == pytest.approx(values.mean())
    # 2 * 1.96 / sqrt(2000) = .0877; the percentile of 1000 draws is good to a few percent.
    assert found.hi - found.lo == pytest.approx(0.0877, rel=0.1)
    assert found.lo < found.mean < found.hi


def test_paired_difference_is_blind_to_spread_between_images() -> None:
    base = np.random.default_rng(0).normal(scale=100.0, size=500)
    found = paired_differences({"psnr": base + 0.5}, {"psnr": base}, replicates=500)["psnr"]
    assert found.lo == pytest.approx(0.5)
    assert found.hi == pytest.approx(0.5)


@pytest.mark.parametrize("per_class", [1, 2, 5, 40])
def test_intervals_hold_the_true_mean_as_often_as_they_say(per_class: int) -> None:
    hits = coverage(12, per_class, 1.0, trials=300, replicates=300, seed=3)
    # 300 trials at 95 % have a standard deviation of 1.3 points.
    assert 0.915 <= hits <= 0.985


def test_one_image_per_class_is_as_uncertain_as_images_without_classes() -> None:
    values = np.random.default_rng(0).normal(size=60)
    with_classes = intervals({"x": values}, labels=np.arange(60))["x"]
    assert with_classes == intervals({"x": values})["x"]
    assert with_classes.hi - with_classes.lo > 0.4


def test_images_of_a_class_that_are_alike_count_once() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(20), 50)
    alike = generator.normal(size=20)[labels]
    found = intervals({"x": alike}, labels=labels)["x"]
    of_classes = intervals({"x": alike[::50]})["x"]
    assert found.hi - found.lo == pytest.approx(of_classes.hi - of_classes.lo)


def test_classes_of_unequal_size_weigh_by_their_images() -> None:
    labels = np.repeat(np.arange(8), np.arange(1, 9))
    values = labels.astype(float)
    found = intervals({"x": values}, labels=labels)["x"]
    assert found.mean == pytest.approx(values.mean())
    assert found.lo < found.mean < found.hi


def test_with_few_classes_the_images_are_resampled() -> None:
    values = np.random.default_rng(0).normal(size=400)
    labels = np.repeat(np.arange(4), 100)
    assert intervals({"x": values}, labels=labels) == intervals({"x": values})


def test_a_single_image_has_an_interval_of_no_width() -> None:
    found = intervals({"x": np.array([2.0])})["x"]
    assert (found.lo, found.mean, found.hi) == (2.0, 2.0, 2.0)


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
