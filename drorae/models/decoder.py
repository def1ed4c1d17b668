"""RAE's decoder: a vision transformer from latent tokens to pixels (arXiv:2510.11690).

State-dict keys are those of the released decoders, so that a released file loads without renaming;
hence the nested module names. Attention runs through SDPA. Position table and class token handling
follow the reference: tokens of another grid are resampled to the configured one behind the first
linear layer. Sizes are in
`drorae.models.decoder_config`; importing foreign files is in `drorae.models.checkpoint_layout`.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from drorae.models.decoder_config import DecoderConfig, decoder_preset
from drorae.models.layers import (
    attend,
    grid_side,
    map_to_tokens,
    sincos_position_table,
    tokens_to_map,
)
from drorae.models.matmul import Linear
from drorae.shapes import Float, Tensor

__all__ = ["Decoder", "DecoderConfig", "DecoderOutput", "decoder_preset"]

_gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
}


class DecoderOutput(NamedTuple):
    """Images, and what the last linear layer made them from."""

    images: Tensor
    """[B, 3, H, W] in [0, 1] units, not clamped."""
    features: Tensor
    """Input of the last layer, detached, [B, patches, width]."""


class Decoder(nn.Module):
    """Latent tokens to pixels.

    Args:
        config: Shape.
        recompute: Recompute block activations in the backward pass instead of keeping them.
    """

    decoder_pos_embed: Tensor
    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: DecoderConfig, *, recompute: bool = False) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        width, eps = config.width, config.layer_norm_eps
        self.decoder_embed = Linear(config.latent_channels, width)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        table = sincos_position_table(width, config.grid)
        positions = torch.cat([torch.zeros(1, width), table])[None]  # the class token has none
        self.register_buffer("decoder_pos_embed", positions)
        self.decoder_layers = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.decoder_norm = nn.LayerNorm(width, eps=eps)
        self.decoder_pred = Linear(width, config.patch_px**2 * 3)
        mean, std = (
            torch.tensor(v).view(1, 3, 1, 1) for v in (config.image_mean, config.image_std)
        )
        self.register_buffer("image_mean", mean, persistent=False)
        self.register_buffer("image_std", std, persistent=False)

    def forward(
        self, tokens: Float[Tensor, "batch tokens channels"], *, with_features: bool = False
    ) -> Float[Tensor, "batch 3 side side"] | DecoderOutput:
        """Decode latents as the encoder gives them, not normalised by latent statistics.

        Args:
            tokens: Latents.
            with_features: Return `DecoderOutput`, for `last_layer_gradient`.

        Returns:
            Images in [0, 1] units, not clamped.

        Raises:
            ValueError: If channels differ from the configuration or the tokens fill no square.
        """
        features = self.features(tokens)
        images = self.pixels(features)
        return DecoderOutput(images, features.detach()) if with_features else images

    def features(
        self, tokens: Float[Tensor, "batch tokens channels"]
    ) -> Float[Tensor, "batch patches width"]:
        """Everything up to the input of the last linear layer, patch tokens only."""
        config = self.config
        if tokens.shape[-1] != config.latent_channels:
            raise ValueError(
                f"Latents have {tokens.shape[-1]} channels, the decoder expects "
                f"{config.latent_channels}: use the encoder that the decoder was trained for."
            )
        x = self.decoder_embed(tokens)
        if grid_side(x.shape[1]) != config.grid:
            size = (config.grid, config.grid)
            resized = F.interpolate(tokens_to_map(x), size, mode="bilinear", align_corners=False)
            x = map_to_tokens(resized)
        x = torch.cat([self.trainable_cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.decoder_pos_embed
        for block in self.decoder_layers:
            keep = not (self.recompute and torch.is_grad_enabled())
            x = block(x) if keep else checkpoint(block, x, use_reentrant=False)
        return self.decoder_norm(x)[:, 1:]

    def pixels(
        self, features: Float[Tensor, "batch patches width"]
    ) -> Float[Tensor, "batch 3 side side"]:
        """The last linear layer, laid out as an image in [0, 1] units."""
        patches = self.decoder_pred(features)
        return self.unpatchify(patches) * self.image_std + self.image_mean

    def unpatchify(
        self, patches: Float[Tensor, "batch patches values"]
    ) -> Float[Tensor, "batch 3 side side"]:
        """Token (r, c) holds its pixels in the order (row, column, channel)."""
        grid, px = self.config.grid, self.config.patch_px
        image = patches.unflatten(1, (grid, grid)).unflatten(3, (px, px, 3))  # [B, r, c, y, x, 3]
        return image.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def patchify(
        self, image: Float[Tensor, "batch 3 side side"]
    ) -> Float[Tensor, "batch patches values"]:
        """Inverse of `unpatchify`."""
        grid, px = self.config.grid, self.config.patch_px
        image = image.unflatten(3, (grid, px)).unflatten(2, (grid, px))  # [B, 3, r, y, c, x]
        return image.permute(0, 2, 4, 3, 5, 1).flatten(3, 5).flatten(1, 2)

    @torch.no_grad()
    def last_layer_gradient(
        self,
        features: Float[Tensor, "batch patches width"],
        image_gradient: Float[Tensor, "batch 3 side side"],
    ) -> Float[Tensor, "values width"]:
        """Gradient of a loss at the last layer's weight, from its gradient at the image.

        One matrix product instead of a backward pass; works whether or not the decoder is trained.
        The adaptive weight of Eq. 6 compares the norms of two such gradients.
        """
        dtype = torch.promote_types(features.dtype, torch.float32)
        patches = self.patchify(image_gradient.to(dtype) * self.image_std)
        return torch.einsum("bnv,bnw->vw", patches, features.to(dtype))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.attention = nn.ModuleDict(
            {name: Linear(width, width, bias=qkv_bias) for name in ("query", "key", "value")}
        )
        self.output = nn.ModuleDict({"dense": Linear(width, width)})

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self.attention[name](x) for name in ("query", "key", "value"))
        return self.output["dense"](attend(query, key, value, self.heads))


class _Block(nn.Module):
    """Pre-norm attention and MLP, under the names of transformers' ViT-MAE of 2022."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, hidden, eps = config.width, config.mlp_hidden, config.layer_norm_eps
        self.activation = ACTIVATIONS[config.hidden_act]
        self.attention = _Attention(width, config.heads, config.qkv_bias)
        self.intermediate = nn.ModuleDict({"dense": Linear(width, hidden)})
        self.output = nn.ModuleDict({"dense": Linear(hidden, width)})
        self.layernorm_before = nn.LayerNorm(width, eps=eps)
        self.layernorm_after = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        hidden = self.activation(self.intermediate["dense"](self.layernorm_after(x)))
        return x + self.output["dense"](hidden)
