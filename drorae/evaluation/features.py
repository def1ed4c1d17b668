"""Image features for set distances: EfficientNet-Lite0 or the standard Inception.

The standard Inception weights are in no package registry, so the default feature space is the 1280
pooled channels of ImageNet EfficientNet-Lite0. Distances in it are named as such and compare with
no published FID. Features of one set of images are computed once, stored as files, and reused for
every metric.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from torch.nn import functional
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from drorae.shapes import Tensor, UInt8

__all__ = [
    "EfficientNetLite0Features",
    "FeatureSet",
    "Features",
    "build_features",
    "file_sha256",
]

EFFICIENTNET = "drorae-efficientnet-lite0"
INCEPTION = "inception-v3-compat"
LITE0_MEAN, LITE0_SCALE = 127.0, 128.0  # input (byte - 127) / 128: tf_efficientnet_lite0


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSet:
    """Features of one set of images, row i from image i."""

    pooled: np.ndarray
    """float32 [N, D]: for FD, KID, precision and recall."""
    logits: np.ndarray
    """float32 [N, classes]: for the Inception-Score-like number."""


class EfficientNetLite0Features(FeatureExtractorBase):
    """timm's `tf_efficientnet_lite0` as a torch-fidelity extractor: "1280" and "logits".

    Args:
        name: Registered name.
        features_list: Which features to return.
        feature_extractor_weights_path: Safetensors file with timm's state dict; required, nothing
            is downloaded.
        feature_px: Side to which images are resized (bicubic, antialiased), pixels.
        **kwargs: torch-fidelity's other settings, unused.
    """

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        feature_px: int = 224,
        **kwargs: Any,
    ) -> None:
        super().__init__(name, features_list)
        if feature_extractor_weights_path is None:
            raise ValueError(
                "efficientnet-lite0 got no weights path: expected a safetensors file; run `drorae "
                "assets fetch smoke`."
            )
        self.feature_px = feature_px
        self.net: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        self.net.load_state_dict(load_file(feature_extractor_weights_path))
        self.net.requires_grad_(False).eval()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Names of the features that can be asked for."""
        return ("1280", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Logits for the score, pooled features for everything else."""
        return "logits" if metric == "isc" else "1280"

    @staticmethod
    def can_be_compiled() -> bool:
        """Not worth a compilation for one pass over the images."""
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        """An input of the right type."""
        return torch.zeros(1, 3, 32, 32, dtype=torch.uint8)

    def forward(self, input: UInt8[Tensor, "batch 3 height width"]) -> tuple[Tensor, ...]:
        """Features in the order of `features_list`."""
        images = input.float()
        size = (self.feature_px, self.feature_px)
        if images.shape[-2:] != size:
            images = functional.interpolate(
                images, size=size, mode="bicubic", align_corners=False, antialias=True
            ).clamp(0.0, 255.0)
        pooled = self.net.forward_head(
            self.net.forward_features((images - LITE0_MEAN) / LITE0_SCALE), pre_logits=True
        )
        features = {"1280": pooled, "logits": self.net.get_classifier()(pooled)}
        return tuple(features[name] for name in self.features_list)


class Features:
    """Turns images into a `FeatureSet`, in batches.

    Args:
        extractor: A torch-fidelity feature extractor whose list is (pooled, logits).
        identity: Text that names network, input size and weights exactly.
        batch_images: Images per forward pass.
        device: Where to compute.
    """

    def __init__(
        self,
        extractor: FeatureExtractorBase,
        *,
        identity: str,
        batch_images: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.extractor = extractor.to(device)
        self.identity = identity
        self.batch_images = batch_images
        self.device = device

    @torch.no_grad()
    def of(self, images: Tensor) -> FeatureSet:
        """Features of all images, uint8 [N, 3, H, W].

        Raises:
            ValueError: If the images are not uint8.
        """
        if images.dtype != torch.uint8 or len(images) == 0:
            raise ValueError(
                f"features got {images.dtype} {tuple(images.shape)}: expected at least one uint8 "
                "image."
            )
        batches = [self.extractor(part.to(self.device)) for part in images.split(self.batch_images)]
        pooled, logits = (
            torch.cat(parts).float().cpu().numpy() for parts in zip(*batches, strict=True)
        )
        return FeatureSet(pooled=pooled, logits=logits)


def build_features(
    kind: str,
    weights_path: Path,
    *,
    feature_px: int = 224,
    batch_images: int = 64,
    device: torch.device | str = "cpu",
) -> Features:
    """Make the extractor that the configuration names.

    Args:
        kind: "efficientnet-lite0" or "inception-v3".
        weights_path: Weights file; nothing is downloaded.
        feature_px: Input side for efficientnet-lite0, pixels.
        batch_images: Images per forward pass.
        device: Where to compute.

    Raises:
        FileNotFoundError: If the weights file does not exist.
        ValueError: For an unknown kind.
    """
    if not weights_path.is_file():
        raise FileNotFoundError(
            f"feature weights {weights_path} do not exist: expected the {kind} weights file; "
            "run `drorae assets fetch smoke` or correct evaluate.inception_weights_path."
        )
    names = {
        "efficientnet-lite0": (EFFICIENTNET, ["1280", "logits"]),
        "inception-v3": (INCEPTION, ["2048", "logits_unbiased"]),
    }
    if kind not in names:
        raise ValueError(f"feature_extractor={kind!r} is unknown: expected one of {list(names)}.")
    if EFFICIENTNET not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(EFFICIENTNET, EfficientNetLite0Features)
    name, layers = names[kind]
    extractor = create_feature_extractor(
        name,
        layers,
        cuda=False,
        verbose=False,
        feature_extractor_weights_path=str(weights_path),
        feature_px=feature_px,
    )
    size = feature_px if kind == "efficientnet-lite0" else 299
    return Features(
        extractor,
        identity=f"{name}:{size}px:{file_sha256(weights_path)}",
        batch_images=batch_images,
        device=device,
    )


def file_sha256(path: Path) -> str:
    """Digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
