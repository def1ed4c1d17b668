"""The networks of a configuration on the meta device, each counted for one image."""

import functools
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from drorae.cost.count import NetworkCost, count_flops, measure
from drorae.losses.perceptual import PerceptualLoss
from drorae.models.decoder import Decoder, DecoderConfig
from drorae.models.discriminator import DinoTrunk, Discriminator, DiscriminatorConfig
from drorae.models.dit import DiT, DiTConfig
from drorae.models.encoder import Encoder
from drorae.models.encoder_config import FAMILIES, EncoderConfig
from drorae.models.fusion import FusionConfig, build_fusion, parameter_counts

__all__ = [
    "count_decoder",
    "count_discriminator",
    "count_dit",
    "count_encoder",
    "count_fusion",
    "count_perceptual",
    "split_fusion",
]

# Parts of a source's name, the more specific first; a name that has none is taken for a DINOv2.
NAMED_FAMILIES = (
    ("dinov3", "dinov3_vit"),
    ("dinov2-with-registers", "dinov2_with_registers"),
    ("siglip", "siglip_vision_model"),
    ("clip", "clip_vision_model"),
    ("mae", "vit_mae"),
)
HEAD_CHANNELS = 64  # channels of an attention head in every ViT of these families
REGISTERS = ("dinov2_with_registers", "dinov3_vit")
DINOV2_TRAINED_PX = 518  # the position table that DINOv2 checkpoints hold

# LPIPS trunks: channels and window of each convolution (torchvision's AlexNet and VGG16).
TRUNKS = {
    "alex": ((64, 11), (192, 5), (384, 3), (256, 3), (256, 3)),
    "vgg": tuple((width, 3) for width in (64, 64, 128, 128, *[256] * 3, *[512] * 6)),
}
TAPS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}


@functools.cache
def count_encoder(config: EncoderConfig) -> NetworkCost:
    """The frozen backbone; from a folder's config.json, else from the family that its name tells.

    No weights are read. Blocks are those of the configuration, heads 64 channels wide, MLPs four
    times the width: true of every backbone of these families but the giants.
    """
    with torch.device("meta"):
        encoder = Encoder(config, _backbone(config))
        images = torch.empty(1, 3, config.input_px, config.input_px)
    return NetworkCost(
        name=f"encoder {config.source.rpartition('/')[2]}",
        parameters=_size(encoder.backbone),
        trainable=0,
        step_flops={"frozen": count_flops(encoder, (images,))},
        activation_bytes={"frozen": 0},
    )


@functools.cache
def count_fusion(config: FusionConfig, encoder: EncoderConfig) -> NetworkCost:
    """The fusion of the layers that the encoder gives."""
    with torch.device("meta"):
        fusion = build_fusion(config, encoder.num_layers, encoder.width)
        hidden = torch.empty(1, encoder.num_layers, encoder.grid**2, encoder.width)
    return measure(f"fusion {config.kind}", _Latent(fusion.eval()), (hidden,))


@functools.cache
def split_fusion(config: FusionConfig, encoder: EncoderConfig) -> dict[str, int]:
    """Parameters of the fusion by part, and their total."""
    with torch.device("meta"):
        return parameter_counts(build_fusion(config, encoder.num_layers, encoder.width))


@functools.cache
def count_decoder(config: DecoderConfig) -> NetworkCost:
    """RAE's decoder."""
    with torch.device("meta"):
        decoder = Decoder(config).eval()
        latent = torch.empty(1, config.grid**2, config.latent_channels)
    total = sum(tensor.numel() for tensor in decoder.state_dict().values())  # with its fixed table
    name = f"decoder {config.width} x {config.layers}"
    return measure(name, decoder, (latent,), parameters=total)


@functools.cache
def count_discriminator(
    config: DiscriminatorConfig, image_px: int
) -> tuple[NetworkCost, NetworkCost]:
    """The frozen trunk, and the heads that learn."""
    with torch.device("meta"):
        trunk = DinoTrunk(config).eval().requires_grad_(False)
        images = torch.empty(1, 3, image_px, image_px)
        features = trunk(images)
        heads = Discriminator(config, DinoTrunk(config)).heads.eval()
    return (
        measure("discriminator trunk", trunk, (images,), roles=("passed",)),
        measure("discriminator heads", _Heads(heads), tuple(features)),
    )


@functools.cache
def count_perceptual(net: Literal["vgg", "alex"], image_px: int) -> NetworkCost:
    """LPIPS's trunk on one image; the comparison itself costs next to nothing."""
    with torch.device("meta"):
        loss = PerceptualLoss(_perceptual_weights(net))
        images = torch.empty(1, 3, image_px, image_px)
    total = sum(buffer.numel() for buffer in loss.buffers())
    features = _Features(loss)
    return measure(f"LPIPS {net}", features, (images,), parameters=total, roles=("passed",))


@functools.cache
def count_dit(name: str, config: DiTConfig) -> NetworkCost:
    """A diffusion transformer; a base head counts when it trains, and in its FLOPs."""
    with torch.device("meta"):
        model = DiT(config).eval()
        shape = (1, config.in_channels, config.input_size, config.input_size)
        inputs = (torch.empty(shape), torch.empty(1), torch.zeros(1, dtype=torch.int64))
    forward = _WithBase(model) if config.base_head_after is not None else model
    return measure(name, forward, inputs, roles=("trained",))


class _Latent(nn.Module):
    """A fusion that gives its latent alone."""

    def __init__(self, fusion: nn.Module) -> None:
        super().__init__()
        self.fusion = fusion

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fusion(hidden).latent


class _Heads(nn.Module):
    """All heads of the discriminator, each on its tap."""

    def __init__(self, heads: nn.ModuleList) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, *features: Tensor) -> list[Tensor]:
        return [head(x) for head, x in zip(self.heads, features, strict=True)]


class _Features(nn.Module):
    """LPIPS's trunk."""

    def __init__(self, loss: PerceptualLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.loss.features(images)


class _WithBase(nn.Module):
    """A diffusion transformer as it trains: both heads."""

    def __init__(self, model: DiT) -> None:
        super().__init__()
        self.model = model

    def forward(self, noisy: Tensor, t: Tensor, labels: Tensor) -> Any:
        return self.model(noisy, t, labels, with_base=True)


def _backbone(config: EncoderConfig) -> nn.Module:
    import transformers  # seconds to import, and only encoders need it

    if (Path(config.source) / "config.json").is_file():
        settings: Any = transformers.AutoConfig.from_pretrained(config.source)
        settings = getattr(settings, "vision_config", settings)
        return getattr(transformers, FAMILIES[settings.model_type].model_class)(settings)
    matches = (family for part, family in NAMED_FAMILIES if part in config.source.lower())
    family = next(matches, "dinov2")
    model_class = getattr(transformers, FAMILIES[family].model_class)
    dinov2 = family.startswith("dinov2")
    options = {"mlp_ratio": 4} if dinov2 else {"intermediate_size": 4 * config.width}
    options |= {"mask_ratio": 0.0} if family == "vit_mae" else {}
    options |= {"num_register_tokens": 4} if family in REGISTERS else {}
    settings = model_class.config_class(
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=max(1, config.width // HEAD_CHANNELS),
        patch_size=config.patch_px,
        image_size=DINOV2_TRAINED_PX if dinov2 else config.input_px,
        **options,
    )
    return model_class(settings)


def _perceptual_weights(net: str) -> dict[str, Tensor]:
    weights, channels = {}, 3
    for index, (width, window) in enumerate(TRUNKS[net]):
        weights[f"trunk.{index}.weight"] = torch.empty(width, channels, window, window)
        weights[f"trunk.{index}.bias"] = torch.empty(width)
        channels = width
    for index, width in enumerate(TAPS[net]):
        weights[f"lin.{index}.weight"] = torch.empty(1, width, 1, 1)
    return weights


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
