"""Which frozen backbone is used, and what differs between backbones. Imports no torch.

See `drorae.models.encoder` for the encoder itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from drorae.config import expand_home

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "FAMILIES",
    "HALF",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "VISION_TOWER",
    "EncoderConfig",
    "Family",
    "check_layers",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """Which frozen backbone is used, at which input size, and which of its blocks are read."""

    source: str = "facebook/dinov2-with-registers-base"
    """Hub id, local folder, or `asset:NAME` for a converted asset. DRoRAE: DINOv2-B with
    registers."""
    revision: str | None = None
    """Hub revision (commit) to pin; ignored for folders and assets."""
    input_px: int = 224
    """Side of the square that the backbone sees, in pixels. RAE: 224 for 256 px images, 448 for
    512."""
    patch_px: int = 14
    """Patch side of the backbone, in pixels; checked against the loaded model."""
    width: int = 768
    """Channels of a token; checked against the loaded model."""
    depth: int = 12
    """Blocks of the backbone; checked against the loaded model."""
    layers: tuple[int, ...] | None = None
    """Blocks to read, 1 = first, ascending, the last block included; none: all of them."""
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    """Per-channel mean of the backbone's input in [0, 1] units. SigLIP: .5; CLIP has its own."""
    image_std: tuple[float, float, float] = IMAGENET_STD
    """Per-channel deviation of the backbone's input in [0, 1] units."""

    def __post_init__(self) -> None:
        """Check what the configuration alone can know."""
        expand_home(self, "source")
        for name in ("input_px", "patch_px", "width", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"encoder.{name}={getattr(self, name)} is out of range: expected at least 1."
                )
        if self.input_px % self.patch_px:
            raise ValueError(
                f"encoder.input_px={self.input_px} is no multiple of "
                f"encoder.patch_px={self.patch_px}; use "
                f"{self.input_px // self.patch_px * self.patch_px or self.patch_px}."
            )
        check_layers(self.block_numbers, self.depth)

    @property
    def block_numbers(self) -> tuple[int, ...]:
        """Blocks that a forward returns, 1-based."""
        return tuple(range(1, self.depth + 1)) if self.layers is None else self.layers

    @property
    def num_layers(self) -> int:
        """Layers that a forward returns."""
        return len(self.block_numbers)

    @property
    def grid(self) -> int:
        """Tokens along one side."""
        return self.input_px // self.patch_px


def check_layers(layers: Sequence[int], depth: int) -> None:
    """Check block numbers that a forward should return.

    Raises:
        ValueError: If they are not ascending, in range and ended by the last block.
    """
    ascending = all(a < b for a, b in pairwise(layers))
    if not layers or not ascending or layers[0] < 1 or layers[-1] != depth:
        raise ValueError(
            f"encoder.layers={tuple(layers)} cannot be read: expected ascending block numbers "
            f"from 1 to {depth} that end with {depth}, because z_base comes from the last block."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What differs between backbones: class, input statistics, extra arguments."""

    model_class: str
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    has_class_token: bool = True
    resize_positions: bool = False
    """Whether the position table is resampled only on request (`interpolate_pos_encoding`)."""


FAMILIES = {
    "dinov2": Family(model_class="Dinov2Model"),
    "dinov2_with_registers": Family(model_class="Dinov2WithRegistersModel"),
    "dinov3_vit": Family(model_class="DINOv3ViTModel"),
    "siglip_vision_model": Family(
        model_class="SiglipVisionModel",
        mean=HALF,
        std=HALF,
        has_class_token=False,
        resize_positions=True,
    ),
    "clip_vision_model": Family(
        model_class="CLIPVisionModel", mean=CLIP_MEAN, std=CLIP_STD, resize_positions=True
    ),
    "vit_mae": Family(model_class="ViTMAEModel", resize_positions=True),
}
# Image-text checkpoints whose vision tower is loaded alone.
VISION_TOWER = {"siglip": "siglip_vision_model", "clip": "clip_vision_model"}
