"""Encoder, fusion and decoder as one tokenizer, and the conventions of its latent.

Three forms of a latent occur: tokens [B, N, C] as the fusion writes and the decoder reads them; the
same as a map [B, C, H, W]; and the map normalised per element by stored statistics, which only the
diffusion model sees.
"""

from typing import Literal

import torch
from torch import nn

from drorae.models.decoder import Decoder
from drorae.models.encoder import Encoder
from drorae.models.fusion_output import FusionOutput
from drorae.models.layers import map_to_tokens, tokens_to_map
from drorae.shapes import Float, Tensor

__all__ = [
    "STATS_EPS",
    "Autoencoder",
    "add_latent_noise",
    "denormalise_latent",
    "draw_noise_scale",
    "map_to_tokens",
    "normalise_latent",
    "tokens_to_map",
]

STATS_EPS = 1e-5  # RAE config, stage_1.params.eps: added to the stored variance at use


def normalise_latent(
    latent: Float[Tensor, "batch channels height width"],
    mean: Float[Tensor, "channels height width"],
    var: Float[Tensor, "channels height width"],
    eps: float = STATS_EPS,
) -> Float[Tensor, "batch channels height width"]:
    """Per-element normalisation of a latent map: (latent - mean) / sqrt(var + eps)."""
    return (latent - mean) / torch.sqrt(var + eps)


def denormalise_latent(
    normalised: Float[Tensor, "batch channels height width"],
    mean: Float[Tensor, "channels height width"],
    var: Float[Tensor, "channels height width"],
    eps: float = STATS_EPS,
) -> Float[Tensor, "batch channels height width"]:
    """Inverse of `normalise_latent`."""
    return normalised * torch.sqrt(var + eps) + mean


def draw_noise_scale(
    num_samples: int,
    tau: float,
    generator: torch.Generator,
    distribution: Literal["uniform", "half_normal"] = "uniform",
) -> Float[Tensor, " batch"]:
    """Deviation of the training noise of each sample, on the generator's device.

    RAE's code draws tau * U(0, 1), mean tau / 2; its paper describes |N(0, tau^2)|, mean 0.8 tau.
    The code made the released decoders, so `uniform` is the default.

    Args:
        num_samples: Samples.
        tau: Scale; 0 gives no noise. RAE: 0.8.
        generator: Source of randomness.
        distribution: Which of the two.

    Raises:
        ValueError: If tau is negative.
    """
    if tau < 0:
        raise ValueError(f"tau={tau} is out of range: expected 0 (no noise) or more, RAE uses 0.8.")
    draw = torch.rand if distribution == "uniform" else torch.randn
    return tau * draw(num_samples, generator=generator, device=generator.device).abs()


def add_latent_noise(
    latent: Float[Tensor, "batch tokens dim"],
    scale: Float[Tensor, " batch"],
    noise: Float[Tensor, "batch tokens dim"],
) -> Float[Tensor, "batch tokens dim"]:
    """RAE's decoder augmentation: latent + scale * noise, before any latent statistics.

    Args:
        latent: Tokens as the fusion writes them.
        scale: One deviation per sample, from `draw_noise_scale`.
        noise: Standard normal draw.
    """
    return latent + scale.view(-1, 1, 1) * noise


class Autoencoder(nn.Module):
    """A whole tokenizer: images to latents and back.

    Args:
        encoder: Frozen backbone.
        fusion: Any fusion of `drorae.models.fusion.build_fusion`.
        decoder: Decoder of latents of the same width.

    Raises:
        ValueError: If the decoder expects other channels than the encoder gives.
    """

    def __init__(self, encoder: Encoder, fusion: nn.Module, decoder: Decoder) -> None:
        super().__init__()
        if encoder.width != decoder.config.latent_channels:
            raise ValueError(
                f"The encoder gives {encoder.width} channels, the decoder expects "
                f"{decoder.config.latent_channels}: set decoder.latent_channels={encoder.width}."
            )
        self.encoder = encoder
        self.fusion = fusion
        self.decoder = decoder

    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> FusionOutput:
        """Images in [0, 1] to latent tokens, with the weights that led to them."""
        return self.fusion(self.encoder(images))

    def decode(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch 3 side side"]:
        """Latent tokens to images in [0, 1] units, not clamped."""
        return self.decoder(tokens)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 side side"]:
        """Reconstruct images: encode and decode without noise."""
        return self.decode(self.encode(images).latent)
