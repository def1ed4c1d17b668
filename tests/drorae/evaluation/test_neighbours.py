import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from drorae.evaluation import neighbours
from drorae.evaluation.neighbours import neighbour_radii, precision_and_recall


def rows(count: int, seed: int, shift: float = 0.0, dim: int = 24) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.normal(size=(count, dim)) + shift).astype(np.float32)


@pytest.fixture(params=[(7, 11), (1024, 8192)], ids=["many blocks", "one block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "ROWS", request.param[0])
    monkeypatch.setattr(neighbours, "COLUMNS", request.param[1])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("count", [60, 101])
@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_blocks_give_the_numbers_of_torch_fidelity(count: int, shift: float) -> None:
    samples, photos = rows(count, 1, shift), rows(83, 2)
    found = precision_and_recall(
        samples, neighbour_radii(samples, 3), photos, neighbour_radii(photos, 3)
    )
    theirs = prc_features_to_metric(
        torch.from_numpy(samples), torch.from_numpy(photos), prc_neighborhood=3, verbose=False
    )
    assert found == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-7)
    assert 0 < min(found) < 1


@pytest.mark.usefixtures("blocks")
def test_the_radius_is_the_distance_to_the_third_other_image() -> None:
    line = np.array([[0.0], [1.0], [3.0], [7.0], [15.0]], np.float32)
    np.testing.assert_allclose(neighbour_radii(line, 3), [7, 6, 4, 7, 14], atol=1e-3)
    np.testing.assert_allclose(neighbour_radii(line, 1), [1, 1, 2, 4, 8], atol=1e-3)


def test_as_many_neighbours_as_images_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit 3 images"):
        neighbour_radii(rows(3, 0), 3)
