"""Small encoders with random weights: the same code path as the real ones, with no download.

For tests and for dry runs of a recipe's shapes. Nothing learned with one is worth keeping.
"""

import torch
from torch import nn

from drorae.models.encoder import Encoder
from drorae.models.encoder_config import FAMILIES, EncoderConfig

__all__ = ["build_random_encoder"]


def build_random_encoder(
    family: str = "dinov2_with_registers",
    *,
    width: int = 32,
    depth: int = 4,
    heads: int = 2,
    patch_px: int = 4,
    input_px: int = 16,
    layers: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Encoder:
    """A tiny random backbone of one family; equal arguments give equal weights.

    Args:
        family: Model type of transformers, one of `drorae.models.encoder_config.FAMILIES`.
        width: Channels of a token.
        depth: Blocks.
        heads: Attention heads.
        patch_px: Patch side in pixels.
        input_px: Input side in pixels.
        layers: Blocks to read; none: all.
        seed: Seed of the weights; the global generator is left as it was.

    Raises:
        ValueError: If the family is unknown.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} is unknown: expected one of {sorted(FAMILIES)}.")
    config = EncoderConfig(
        source=f"random:{family}",
        input_px=input_px,
        patch_px=patch_px,
        width=width,
        depth=depth,
        layers=layers,
        image_mean=FAMILIES[family].mean,
        image_std=FAMILIES[family].std,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = _build_backbone(family, config, heads)
        # Fresh blocks barely change their input (deviation 0.02); larger weights make layers
        # differ.
        for parameter in backbone.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(std=width**-0.5)
    return Encoder(config, backbone)


def _build_backbone(family: str, config: EncoderConfig, heads: int) -> nn.Module:
    # Slow to import; see drorae.models.encoder.
    import transformers

    model_class = getattr(transformers, FAMILIES[family].model_class)
    mlp = (
        {"mlp_ratio": 2} if family.startswith("dinov2") else {"intermediate_size": 2 * config.width}
    )
    masking = {"mask_ratio": 0.0} if family == "vit_mae" else {}
    registers = {} if family != "dinov3_vit" else {"num_register_tokens": 4}
    settings = model_class.config_class(
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=heads,
        patch_size=config.patch_px,
        image_size=config.input_px,
        **mlp,
        **masking,
        **registers,
    )
    return model_class(settings)
