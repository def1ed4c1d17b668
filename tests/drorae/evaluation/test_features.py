from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from drorae.evaluation.features import EfficientNetLite0Features, FeatureSet, build_features
from drorae.evaluation.stored import read_features, write_features


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "efficientnet-lite0.safetensors"
    save_file(timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (5, 3, 20, 20), generator=generator).to(torch.uint8)


def test_features_are_1280_wide_and_do_not_depend_on_the_batch(
    weights: Path, images: torch.Tensor
) -> None:
    small = build_features("efficientnet-lite0", weights, feature_px=32, batch_images=2).of(images)
    large = build_features("efficientnet-lite0", weights, feature_px=32, batch_images=5).of(images)
    assert small.pooled.shape == (5, 1280)
    assert small.logits.shape == (5, 1000)
    np.testing.assert_allclose(small.pooled, large.pooled, rtol=1e-3, atol=1e-5)


def test_input_is_scaled_as_the_weights_expect(weights: Path) -> None:
    extractor = EfficientNetLite0Features("own", ["logits"], str(weights), feature_px=32)
    gray = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    with torch.no_grad():
        expected = extractor.net(torch.ones(1, 3, 32, 32))  # (255 - 127) / 128
        torch.testing.assert_close(extractor(gray)[0], expected)


def test_files_of_features_are_read_back_in_their_order(tmp_path: Path) -> None:
    rows = np.arange(20, dtype=np.float32).reshape(5, 4)
    sets = [FeatureSet(pooled=rows[i : i + 1], logits=-rows[i : i + 1]) for i in range(5)]
    uris = [str(tmp_path / name) for name in ("a.npz", "b.npz")]
    write_features(uris[0], sets[:3])
    write_features(uris[1], sets[3:])
    found = read_features(uris, 4)
    np.testing.assert_array_equal(found.pooled, rows[:4])
    np.testing.assert_array_equal(found.logits, -rows[:4])
    with pytest.raises(ValueError, match="have 5 rows: expected 6"):
        read_features(uris, 6)


def test_missing_weights_unknown_kind_and_wrong_input_are_refused(
    weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="do not exist"):
        build_features("efficientnet-lite0", tmp_path / "none")
    with pytest.raises(ValueError, match="expected one of"):
        build_features("resnet", weights)
    with pytest.raises(ValueError, match="no weights path"):
        EfficientNetLite0Features("own", ["1280"])
    features = build_features("efficientnet-lite0", weights, feature_px=32)
    with pytest.raises(ValueError, match="uint8"):
        features.of(torch.zeros(1, 3, 8, 8))
