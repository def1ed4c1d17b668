"""Frozen vision transformer that turns images into the raw outputs of its blocks.

Wraps the backbones of transformers (DINOv2 with and without registers, DINOv3, SigLIP and SigLIP2
at fixed resolution, CLIP, MAE) behind one forward: pixels in [0, 1] in, hidden states [batch,
layers, tokens, dim] out. Layer l is z(l) of arXiv:2605.10780, Eq. 1: the output of block l,
before any final LayerNorm. Block outputs are read by hooks that live for one call, because
`hidden_states[-1]` of transformers is before the final norm in some models and after it in others,
and because only the layers asked for are then kept. Input handling follows RAE's wrapper: bicubic
resize without antialias, then the backbone's mean and deviation.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from drorae.models.encoder_config import (
    FAMILIES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    VISION_TOWER,
    EncoderConfig,
    check_layers,
)
from drorae.models.layers import normalise_features
from drorae.models.matmul import use_faster_products
from drorae.shapes import Float, Tensor

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Encoder", "EncoderConfig", "build_encoder"]

ASSET_PREFIX = "asset:"
# Not needed without masking, and absent from some exported checkpoints.
OPTIONAL_KEYS = frozenset({"embeddings.mask_token"})


class Encoder(nn.Module):
    """Frozen backbone: always in eval mode, without gradients, the same output for the same image.

    Args:
        config: Expected shape and input handling of the backbone.
        backbone: A loaded transformers vision model.

    Raises:
        ValueError: If the backbone is of an unknown family or differs from the configuration.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: EncoderConfig, backbone: nn.Module) -> None:
        super().__init__()
        self.config = config
        use_faster_products(backbone)
        self.backbone = backbone.eval().requires_grad_(False)
        settings: Any = backbone.config
        self._check_backbone(settings)
        family = FAMILIES[settings.model_type]
        self.layer_norm_eps = float(settings.layer_norm_eps)
        self.num_prefix_tokens = int(family.has_class_token) + getattr(
            settings, "num_register_tokens", 0
        )
        self._blocks = _find_blocks(backbone, config.depth)
        self._arguments = {"interpolate_pos_encoding": True} if family.resize_positions else {}
        self._masks_tokens = settings.model_type == "vit_mae"
        self.register_buffer("image_mean", _channels(config.image_mean), persistent=False)
        self.register_buffer("image_std", _channels(config.image_std), persistent=False)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.config.width

    @property
    def num_layers(self) -> int:
        """Layers that a forward returns."""
        return self.config.num_layers

    @property
    def grid(self) -> int:
        """Tokens along one side."""
        return self.config.grid

    def train(self, mode: bool = True) -> "Encoder":
        """Stay in eval mode whatever the parent module does: the encoder is frozen."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        layers: tuple[int, ...] | None = None,
    ) -> Float[Tensor, "batch layers tokens dim"]:
        """Outputs of the chosen blocks, patch tokens only, not normalised.

        Args:
            images: Pixels in [0, 1], any size; resized to a square without keeping the aspect
                ratio.
            layers: Block numbers instead of the configured ones; `(depth,)` gives RAE's input
                alone.

        Raises:
            ValueError: If the block numbers are not ascending, in range and ended by the last
                block.
        """
        wanted = self.config.block_numbers if layers is None else layers
        check_layers(wanted, self.config.depth)
        arguments: dict[str, Any] = dict(self._arguments)
        if self._masks_tokens:
            # MAE shuffles tokens by sorting noise: ascending noise keeps their order, nothing is
            # masked.
            arguments["noise"] = torch.arange(self.grid**2, device=images.device).expand(
                len(images), -1
            )
        with self._capture(wanted) as found:
            self.backbone(pixel_values=self.prepare(images), **arguments)
        return found["hidden"]

    def prepare(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 side side"]:
        """Resize and normalise pixels as RAE does: bicubic, no antialias, no clamp."""
        side = self.config.input_px
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, size=(side, side), mode="bicubic", align_corners=False)
        return (images - self.image_mean) / self.image_std

    def base(self, last: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """z_base of Eq. 1: the final LayerNorm without its affine part, as RAE uses it."""
        return normalise_features(last, self.layer_norm_eps)

    def weights_digest(self) -> str:
        """Sha256 over the backbone's weights: equal digests, equal latents."""
        total = hashlib.sha256()
        for name, tensor in sorted(self.backbone.state_dict().items()):
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    @contextmanager
    def _capture(self, layers: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """Collect block outputs of one call; the hooks are gone afterwards, also after an error."""
        found: dict[str, Tensor] = {}

        def keep(position: int, output: Any) -> None:
            tokens = output[0] if isinstance(output, tuple) else output
            patches = tokens[:, self.num_prefix_tokens :]
            if not found:
                batch, num_tokens, width = patches.shape
                found["hidden"] = patches.new_empty(batch, len(layers), num_tokens, width)
            found["hidden"][:, position] = patches

        handles = [
            self._blocks[number - 1].register_forward_hook(
                lambda _module, _inputs, output, position=position: keep(position, output)
            )
            for position, number in enumerate(layers)
        ]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def _check_backbone(self, settings: Any) -> None:
        if settings.model_type not in FAMILIES:
            raise ValueError(
                f"encoder.source={self.config.source} is a {settings.model_type} model: "
                f"expected one of {sorted(FAMILIES)}; NaFlex SigLIP2 has no fixed grid."
            )
        found = {
            "width": settings.hidden_size,
            "depth": settings.num_hidden_layers,
            "patch_px": settings.patch_size,
        }
        for name, value in found.items():
            if value != getattr(self.config, name):
                raise ValueError(
                    f"encoder.{name}={getattr(self.config, name)} does not fit "
                    f"{self.config.source}, which has {value}; set encoder.{name}={value}."
                )
        family = FAMILIES[settings.model_type]
        if (self.config.image_mean, self.config.image_std) != (family.mean, family.std):
            warnings.warn(
                f"encoder.image_mean={self.config.image_mean} and image_std="
                f"{self.config.image_std} differ from {family.mean} and {family.std}, those of "
                f"{settings.model_type}: features may be off.",
                stacklevel=3,
            )


def build_encoder(config: EncoderConfig, resolve: Callable[[str], Path] | None = None) -> Encoder:
    """Load the backbone that a configuration names.

    Args:
        config: A folder and an asset load without network; a hub id uses the local hub cache first.
        resolve: Turns the NAME of `asset:NAME` into a folder; needed for such sources only.

    Raises:
        ValueError: If the checkpoint lacks weights, is of an unknown family or differs in shape.
        FileNotFoundError: If an asset is used and its folder is missing.
    """
    source = config.source
    if source.startswith(ASSET_PREFIX):
        source = str(_asset_folder(source.removeprefix(ASSET_PREFIX), resolve))
    return Encoder(config, _load_backbone(source, config.revision))


def _asset_folder(name: str, resolve: Callable[[str], Path] | None) -> Path:
    if resolve is None:
        raise ValueError(
            f"encoder.source=asset:{name} needs `resolve`: pass the function that finds assets."
        )
    folder = Path(resolve(name))
    if not folder.is_dir():
        raise FileNotFoundError(f"Asset {name}: {folder} is no folder; fetch the assets first.")
    return folder


def _load_backbone(source: str, revision: str | None) -> nn.Module:
    # Slow to import, and configurations of this module are read where no model is built.
    import transformers

    offline = Path(source).is_dir()
    options: dict[str, Any] = {
        "local_files_only": offline,
        "revision": None if offline else revision,
    }
    options = {key: value for key, value in options.items() if value is not None}
    settings = transformers.AutoConfig.from_pretrained(source, **options)
    model_type = VISION_TOWER.get(settings.model_type, settings.model_type)
    if model_type not in FAMILIES:
        raise ValueError(
            f"encoder.source={source} is a {settings.model_type} model: expected one of "
            f"{sorted({*FAMILIES, *VISION_TOWER})}."
        )
    model_class = getattr(transformers, FAMILIES[model_type].model_class)
    if model_type == "vit_mae":
        options["mask_ratio"] = 0.0
    backbone, report = model_class.from_pretrained(
        source, dtype=torch.float32, output_loading_info=True, **options
    )
    missing = sorted(set(report["missing_keys"]) - OPTIONAL_KEYS)
    if missing:
        raise ValueError(
            f"encoder.source={source} lacks {len(missing)} weights of {model_class.__name__} "
            f"(first: {missing[0]}): expected a complete checkpoint; fetch it again."
        )
    return backbone


def _find_blocks(backbone: nn.Module, depth: int) -> list[nn.Module]:
    """The transformer blocks: the one module list of that length, wherever the family keeps it."""
    lists = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    assert lists, f"no module list of {depth} blocks in {type(backbone).__name__}"
    return list(lists[0])


def _channels(values: tuple[float, float, float]) -> Float[Tensor, "1 3 1 1"]:
    return torch.tensor(values).view(1, 3, 1, 1)
