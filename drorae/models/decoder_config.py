"""Configuration and size presets of RAE's decoder (arXiv:2510.11690), without torch.

The network itself is in `drorae.models.decoder`.
"""

from dataclasses import dataclass, replace
from typing import Literal

from drorae.models.encoder_config import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["DecoderConfig", "decoder_preset"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Shape of the decoder. Defaults: RAE's ViT-XL for DINOv2-B at 256 px, 415M parameters."""

    latent_channels: int = 768
    """Channels of a latent token: the encoder's width."""
    width: int = 1152
    """Channels inside. RAE: 768 (B), 1024 (L), 1152 (XL)."""
    layers: int = 28
    """Transformer blocks. RAE: 12, 24, 28."""
    heads: int = 16
    """Attention heads. RAE: 12, 16, 16."""
    mlp_hidden: int = 4096
    """Hidden width of a block's MLP. RAE: 3072, 4096, 4096."""
    grid: int = 16
    """Tokens along one side."""
    patch_px: int = 16
    """Pixels along one side that a token becomes; image side = grid * patch_px."""
    layer_norm_eps: float = 1e-12
    """LayerNorm epsilon. RAE: 1e-12, from the ViT-MAE configuration."""
    qkv_bias: bool = True
    """Whether query, key and value have a bias. RAE: true."""
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"] = "gelu"
    """Activation of the MLP under transformers' names; `gelu` is the exact one. RAE: gelu."""
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    """The encoder's input mean; the output is image * std + mean. RAE: that of the encoder."""
    image_std: tuple[float, float, float] = IMAGENET_STD
    """The encoder's input deviation."""

    def __post_init__(self) -> None:
        """Check what the configuration alone can know."""
        for name in ("latent_channels", "layers", "heads", "mlp_hidden", "grid", "patch_px"):
            if getattr(self, name) < 1:
                raise ValueError(f"decoder.{name}={getattr(self, name)}: expected at least 1.")
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"decoder.width={self.width} does not fit decoder.heads={self.heads}: expected a "
                "multiple of the heads and of 4 (position table)."
            )

    @property
    def image_px(self) -> int:
        """Side of the decoded image."""
        return self.grid * self.patch_px


PRESETS = {
    "ViT-B": DecoderConfig(width=768, layers=12, heads=12, mlp_hidden=3072),
    "ViT-L": DecoderConfig(width=1024, layers=24, heads=16, mlp_hidden=4096),
    "ViT-XL": DecoderConfig(),
}


def decoder_preset(size: str, latent_channels: int = 768, grid: int = 16) -> DecoderConfig:
    """RAE's decoder of one size: ViT-B, ViT-L or ViT-XL.

    Raises:
        ValueError: If the size is unknown.
    """
    if size not in PRESETS:
        raise ValueError(f"size={size!r} is no decoder: expected one of {sorted(PRESETS)}.")
    return replace(PRESETS[size], latent_channels=latent_channels, grid=grid)
