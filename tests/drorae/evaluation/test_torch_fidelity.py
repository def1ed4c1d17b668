"""Our features and distances against torch-fidelity doing everything itself, on the same images."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.utils.data import Dataset
from torch_fidelity import calculate_metrics, register_feature_extractor

from drorae.evaluation.features import EfficientNetLite0Features, build_features
from drorae.evaluation.frechet import distances, reference_of

PX = 32
SETTINGS = {"kid_subset_size": 20, "prc_neighborhood": 3, "isc_splits": 2, "kid_subsets": 50}


class SmallImages(EfficientNetLite0Features):
    """Ours at a small size; torch-fidelity hands no size on."""

    def __init__(self, name: str, features_list: list[str], **settings: Any) -> None:
        super().__init__(name, features_list, **{**settings, "feature_px": PX})


class Pictures(Dataset[torch.Tensor]):
    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


def pictures(count: int, seed: int, contrast: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    return (128 + contrast * (coarse - 0.5)).repeat_interleave(8, 2).repeat_interleave(8, 3).byte()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "efficientnet-lite0.safetensors"
    save_file(timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict(), path)
    return path


def test_all_distances_are_those_of_torch_fidelity(weights: Path) -> None:
    drawn, photos = pictures(48, 0, 160.0), pictures(56, 1, 230.0)
    register_feature_extractor("drorae-small-images", SmallImages)
    theirs = calculate_metrics(
        input1=Pictures(drawn),
        input2=Pictures(photos),
        feature_extractor="drorae-small-images",
        feature_extractor_weights_path=str(weights),
        cuda=False,
        batch_size=8,
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
        **SETTINGS,
    )
    features = build_features("efficientnet-lite0", weights, feature_px=PX, batch_images=16)
    ours = distances(
        features.of(drawn), reference_of(features.of(photos).pooled), kid_subset=20, isc_splits=2
    )
    assert ours.fd == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert ours.kid == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3, abs=1e-6)
    assert ours.precision == pytest.approx(theirs["precision"], abs=1 / 48)
    assert ours.recall == pytest.approx(theirs["recall"], abs=1 / 56)
    assert ours.score == pytest.approx(theirs["inception_score_mean"], rel=1e-3)


def test_a_set_of_bounded_blocks_has_the_covariance_of_numpy() -> None:
    rows = torch.randn(9000, 6, generator=torch.Generator().manual_seed(0)).numpy()
    found = reference_of(rows).gaussian
    expected = torch.from_numpy(rows).double()
    torch.testing.assert_close(torch.from_numpy(found.mean), expected.mean(dim=0))
    torch.testing.assert_close(torch.from_numpy(found.covariance), expected.T.cov())
