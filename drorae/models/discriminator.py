"""RAE's patch discriminator: five trained heads on a frozen DINO ViT-S/8.

State-dict keys of the heads are RAE's (80 tensors, 7,386,245 parameters at full size). The frozen
trunk (21,670,272) lies in non-persistent buffers: it moves with the module and is in no checkpoint
and no optimiser. Under DistributedDataParallel set `broadcast_buffers=False`. The
shape is in `drorae.models.discriminator_config`; augmentation and losses are in
`drorae.losses.adversarial`.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from drorae.models.discriminator_config import DiscriminatorConfig
from drorae.models.encoder import ASSET_PREFIX, IMAGENET_MEAN, IMAGENET_STD
from drorae.models.layers import attend
from drorae.models.matmul import Linear
from drorae.shapes import Float, Tensor

__all__ = ["Discriminator", "DiscriminatorConfig", "build_discriminator"]

RANDOM_SOURCE = "random"
NORM_EPS = 1e-6  # RAE: LayerNorm of the trunk and local norm of the heads
SPECTRAL_EPS = 1e-12  # RAE: spectral norm, one power iteration
LEAK = 0.2


class Discriminator(nn.Module):
    """Logits of every token under every head.

    Args:
        config: Shape.
        trunk: A `DinoTrunk` of that shape; frozen here.
    """

    def __init__(self, config: DiscriminatorConfig, trunk: "DinoTrunk") -> None:
        super().__init__()
        self.config = config
        self.trunk = trunk.eval()
        _freeze_as_buffers(self.trunk)
        self.heads = nn.ModuleList(_head(config.width, config.kernel) for _ in config.taps)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch logits"]:
        """Logits [batch, heads * tokens] of images in [-1, 1]; higher means real."""
        features = self.trunk(images)
        logits = [head(x).flatten(1) for head, x in zip(self.heads, features, strict=True)]
        return torch.cat(logits, dim=1)


class DinoTrunk(nn.Module):
    """DINO vision transformer under DINO's parameter names, read at several blocks.

    Args:
        config: Shape.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        width, px = config.width, config.patch_px
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, px, stride=px)})
        self.blocks = nn.ModuleList(_TrunkBlock(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)  # unused by the taps, part of the file
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("image_mean", mean, persistent=False)
        self.register_buffer("image_std", std, persistent=False)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> list[Float[Tensor, "batch dim tokens"]]:
        """Patch tokens behind each tapped block, channels first."""
        side = self.config.input_px
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bilinear", align_corners=False)
        images = ((images + 1) / 2 - self.image_mean) / self.image_std
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x[:, 1:].transpose(1, 2))
        return [outputs[tap - 1] for tap in self.config.taps]


class _TrunkBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = nn.ModuleDict({"qkv": Linear(width, 3 * width), "proj": Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.ModuleDict({"fc1": Linear(width, 4 * width), "fc2": Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.attn["qkv"](self.norm1(x)).chunk(3, dim=-1)
        x = x + self.attn["proj"](attend(query, key, value, self.num_heads))
        # RAE runs DINO with the tanh form of GELU, although DINO was trained with the exact one.
        hidden = F.gelu(self.mlp["fc1"](self.norm2(x)), approximate="tanh")
        return x + self.mlp["fc2"](hidden)


class SpectralConv1d(nn.Module):
    """Circular convolution along tokens; the weight is divided by its largest singular value.

    Key names are those of torch's first spectral norm, which RAE used. In train mode each forward
    makes one power iteration; in eval mode the stored vectors are used, so that the generator's
    step does not move them.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        kernel: Odd window.
    """

    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        plain = nn.Conv1d(in_channels, out_channels, kernel)
        assert plain.bias is not None
        self.padding = kernel // 2
        self.weight_orig = nn.Parameter(plain.weight.detach())
        self.bias = nn.Parameter(plain.bias.detach())
        left, right = torch.randn(out_channels), torch.randn(in_channels * kernel)
        self.register_buffer("weight_u", F.normalize(left, dim=0, eps=SPECTRAL_EPS))
        self.register_buffer("weight_v", F.normalize(right, dim=0, eps=SPECTRAL_EPS))

    def forward(self, x: Float[Tensor, "batch c_in tokens"]) -> Float[Tensor, "batch c_out tokens"]:
        """Convolve with the normalised weight."""
        padded = F.pad(x, (self.padding, self.padding), mode="circular") if self.padding else x
        return F.conv1d(padded, self._normalised_weight(), self.bias)

    def _normalised_weight(self) -> Tensor:
        matrix = self.weight_orig.flatten(1)
        if self.training:
            with torch.no_grad():
                right = F.normalize(matrix.T @ self.weight_u, dim=0, eps=SPECTRAL_EPS)
                self.weight_v.copy_(right)
                left = F.normalize(matrix @ self.weight_v, dim=0, eps=SPECTRAL_EPS)
                self.weight_u.copy_(left)
        # Copies: the next forward changes the buffers before this one's backward pass.
        sigma = self.weight_u.clone() @ matrix @ self.weight_v.clone()
        return self.weight_orig / sigma


class LocalNorm(nn.Module):
    """RAE's batch norm with a virtual batch of one: each channel over its sample's tokens.

    Computed in float32 at least.

    Args:
        channels: Channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self, x: Float[Tensor, "batch channels tokens"]
    ) -> Float[Tensor, "batch channels tokens"]:
        """Normalise over tokens."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.instance_norm(x.to(dtype), weight=weight, bias=bias, eps=NORM_EPS)


class _Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return (self.fn(x) + x) / math.sqrt(2)


def _head(width: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        _conv_block(width, 1), _Residual(_conv_block(width, kernel)), SpectralConv1d(width, 1, 1)
    )


def _conv_block(width: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(SpectralConv1d(width, width, kernel), LocalNorm(width), nn.LeakyReLU(LEAK))


def build_discriminator(
    config: DiscriminatorConfig, resolve: Callable[[str], Path] | None = None, seed: int = 0
) -> Discriminator:
    """Load the trunk and start the heads.

    Args:
        config: Shape and source of the trunk.
        resolve: Turns the NAME of `asset:NAME` into a file; needed for such sources only.
        seed: Seed of a random trunk; the heads come from the global generator.

    Raises:
        FileNotFoundError: If the trunk's file is missing.
        ValueError: If its tensors are not exactly those of the configured trunk.
    """
    return Discriminator(config, _load_trunk(config, resolve, seed))


def _load_trunk(
    config: DiscriminatorConfig, resolve: Callable[[str], Path] | None, seed: int
) -> DinoTrunk:
    if config.source == RANDOM_SOURCE:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            trunk = DinoTrunk(config)
            nn.init.normal_(trunk.pos_embed, std=0.02)
        return trunk
    name = config.source.removeprefix(ASSET_PREFIX)
    if name != config.source and resolve is None:
        raise ValueError(
            f"discriminator.source={config.source} needs `resolve`: pass the function "
            "that finds assets."
        )
    path = Path(name) if name == config.source or resolve is None else Path(resolve(name))
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is no file: expected the DINO ViT-S/8 state dict; set discriminator.source."
        )
    trunk = DinoTrunk(config)
    state = torch.load(path, map_location="cpu", weights_only=True)
    _check_trunk(state, trunk, path)
    # RAE zeroes the key third of every qkv bias when it loads DINO.
    for key in [k for k in state if k.endswith("attn.qkv.bias")]:
        state[key] = state[key].clone()
        state[key][config.width : 2 * config.width] = 0
    trunk.load_state_dict(state)
    return trunk


def _check_trunk(state: dict[str, Tensor], trunk: DinoTrunk, path: Path) -> None:
    expected = {key: value.shape for key, value in trunk.state_dict().items()}
    wrong = sorted(
        key
        for key in expected.keys() | state.keys()
        if key not in expected or key not in state or state[key].shape != expected[key]
    )
    if wrong:
        raise ValueError(
            f"{path} does not fit the discriminator's trunk: {len(wrong)} tensors are missing, "
            f"extra or misshapen (first: {wrong[0]}); expected the DINO ViT of this configuration."
        )


def _freeze_as_buffers(module: nn.Module) -> None:
    """Turn parameters into non-persistent buffers: not trained, not saved, moved by `.to`."""
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            delattr(child, name)
            child.register_buffer(name, parameter.detach(), persistent=False)
