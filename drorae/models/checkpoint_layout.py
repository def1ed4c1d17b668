"""Reading decoder weights and latent statistics written by others, strictly.

RAE's own loader is not strict and reports missing keys only in the log, so that a whole training
checkpoint silently gives a random decoder. Here the layout is recognised, the size is read from the
tensors, and any missing, extra or misshapen tensor is an error. Five layouts: a flat decoder; one
under RAE's `decoder.` prefix; a training checkpoint with `ema` and `model`; any of these with
`module.` or `_orig_mod.` from DDP and compile; any of these as safetensors. Opening the file is in
`drorae.models.weights_file`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from drorae.models.decoder import Decoder, DecoderConfig
from drorae.models.encoder import IMAGENET_MEAN, IMAGENET_STD
from drorae.models.weights_file import Container, read_mapping, read_weights
from drorae.shapes import Float, Tensor

__all__ = [
    "ImportReport",
    "ImportedDecoder",
    "LatentStats",
    "check_tensors",
    "import_decoder",
    "load_latent_stats",
    "save_latent_stats",
]

DECODER_PREFIX = "decoder."
# Shapes do not tell the number of heads. RAE's three sizes (arXiv:2510.11690, decoder configs).
HEADS_BY_WIDTH = {768: 12, 1024: 16, 1152: 16}
NUM_AXES = {
    "decoder_embed.weight": 2,
    "decoder_pos_embed": 3,
    "decoder_pred.weight": 2,
    "decoder_layers.0.intermediate.dense.weight": 2,
}
"""Tensors whose shapes tell the sizes, and their numbers of axes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportReport:
    """What was found in a file."""

    container: Container
    """File format."""
    weights: Literal["ema", "model", "plain"]
    """Which weights of a training checkpoint were taken; plain where there is no choice."""
    rae_prefix: bool
    """Whether the decoder lay under `decoder.` beside an encoder."""
    wrappers: tuple[str, ...]
    """Names of DDP or compile that were removed from the keys."""
    ignored: tuple[str, ...]
    """Keys that belong to no decoder, such as those of the encoder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportedDecoder:
    """A decoder read from a file: `Decoder(config).load_state_dict(state)` succeeds."""

    config: DecoderConfig
    """Sizes read from the tensors."""
    state: dict[str, Float[Tensor, "..."]]
    """Weights in float32 under our (RAE's flat) names."""
    report: ImportReport
    """What was found."""


def import_decoder(
    path: str | Path,
    *,
    heads: int | None = None,
    prefer: Literal["ema", "model"] = "ema",
    image_mean: tuple[float, float, float] = IMAGENET_MEAN,
    image_std: tuple[float, float, float] = IMAGENET_STD,
) -> ImportedDecoder:
    """Read a decoder in any of the five layouts.

    Args:
        path: `.pt`, `.pth`, `.bin` or `.safetensors`.
        heads: Attention heads, needed for widths other than RAE's 768, 1024 and 1152.
        prefer: Weights to take from a training checkpoint that has both.
        image_mean: The encoder's input mean; not stored in such files. ImageNet for DINOv2 and MAE,
            .5 for SigLIP2.
        image_std: The encoder's input deviation.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it cannot be read or is no decoder, or any tensor is missing, extra,
            misshapen or not finite.
    """
    path = Path(path)
    found = read_weights(path, prefer)
    state, ignored, prefixed = _select_decoder(found.tensors, path)
    config = replace(_infer_config(state, heads, path), image_mean=image_mean, image_std=image_std)
    _check_complete(state, config, path)
    return ImportedDecoder(
        config=config,
        state={key: value.float().contiguous() for key, value in state.items()},
        report=ImportReport(
            container=found.container,
            weights=found.weights,
            rae_prefix=prefixed,
            wrappers=found.wrappers,
            ignored=ignored,
        ),
    )


def _select_decoder(
    tensors: dict[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], tuple[str, ...], bool]:
    """The decoder's tensors, the other keys, and whether they had RAE's prefix."""
    inside = {
        key.removeprefix(DECODER_PREFIX): value
        for key, value in tensors.items()
        if key.startswith(DECODER_PREFIX)
    }
    if "decoder_embed.weight" in inside:
        ignored = sorted(key for key in tensors if not key.startswith(DECODER_PREFIX))
        return inside, tuple(ignored), True
    if "decoder_embed.weight" in tensors:
        return tensors, (), False
    raise ValueError(
        f"{path} has no decoder_embed.weight (first keys: {sorted(tensors)[:4]}): expected an RAE "
        "decoder; a discriminator or a diffusion model cannot be used here."
    )


def _infer_config(state: dict[str, Tensor], heads: int | None, path: Path) -> DecoderConfig:
    """Sizes from tensor shapes; only the number of heads needs knowledge."""
    absent = [key for key in NUM_AXES if key not in state]
    if absent:
        raise ValueError(f"{path} lacks {absent}: expected a complete RAE decoder; fetch it again.")
    for key, num_axes in NUM_AXES.items():
        if state[key].ndim != num_axes or not state[key].numel():
            raise ValueError(
                f"{path}: {key} has shape {tuple(state[key].shape)}, expected {num_axes} axes "
                "without an empty one, as RAE's decoders have; fetch or extract it again."
            )
    width, channels = state["decoder_embed.weight"].shape
    num_heads = heads if heads is not None else HEADS_BY_WIDTH.get(width)
    if num_heads is None:
        raise ValueError(
            f"{path} has width {width}, whose number of heads the shapes do not tell: pass `heads`."
        )
    # Counted, not the largest: one stray key must not ask for a million layers.
    indices = {key.split(".")[1] for key in state if key.startswith("decoder_layers.")}
    return DecoderConfig(
        latent_channels=channels,
        width=width,
        layers=len(indices),
        heads=num_heads,
        mlp_hidden=state["decoder_layers.0.intermediate.dense.weight"].shape[0],
        grid=max(math.isqrt(state["decoder_pos_embed"].shape[1] - 1), 1),
        patch_px=max(math.isqrt(state["decoder_pred.weight"].shape[0] // 3), 1),
        qkv_bias=any(key.endswith("attention.attention.query.bias") for key in state),
    )


def _check_complete(state: dict[str, Tensor], config: DecoderConfig, path: Path) -> None:
    """Compare every name and shape with a decoder built without memory."""
    with torch.device("meta"):
        expected = Decoder(config).state_dict()
    what = f"RAE decoder of {config.layers} layers, width {config.width}"
    check_tensors(state, expected, f"{path} is no complete {what}")
    poisoned = [key for key, value in state.items() if not value.isfinite().all()]
    if poisoned:
        raise ValueError(
            f"{path}: {len(poisoned)} tensors hold values that are not finite (first: "
            f"{poisoned[0]}): expected trained weights; fetch it again or take an earlier one."
        )


def check_tensors(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], complaint: str
) -> None:
    """Compare names and shapes of a file's tensors with those of a module's state dict.

    Args:
        state: What was read.
        expected: State dict of the module, on any device.
        complaint: Start of the error: which file, and what it is not.

    Raises:
        ValueError: If a tensor is missing, extra or misshapen; names the first of each.
    """
    missing = sorted(expected.keys() - state.keys())
    extra = sorted(state.keys() - expected.keys())
    misshapen = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(wanted.shape)}"
        for key, wanted in expected.items()
        if key in state and state[key].shape != wanted.shape
    ]
    problems = {"missing": missing, "unexpected": extra, "misshapen": misshapen}
    if any(problems.values()):
        text = "; ".join(f"{len(v)} {k} (first: {v[0]})" for k, v in problems.items() if v)
        raise ValueError(f"{complaint}: {text}; fetch or extract it again.")


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentStats:
    """Mean and variance of each element of the latent map over the training set."""

    mean: Float[Tensor, "channels height width"]
    """Mean of each element."""
    var: Float[Tensor, "channels height width"]
    """Population variance, not deviation; RAE's epsilon 1e-5 is added at use."""


def load_latent_stats(path: str | Path) -> LatentStats:
    """Read `{mean, var}` from a released `.pt` file or from our safetensors.

    Either may be absent, as RAE allows: mean 0 or variance 1 then.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it cannot be read, holds neither, shapes differ or are not [C, H, W] (a
            leading axis of one is dropped), or a variance is negative.
    """
    path = Path(path)
    content, _ = read_mapping(path)
    found = {key: content[key] for key in ("mean", "var") if content.get(key) is not None}
    if not found:
        raise ValueError(f"{path} has the keys {sorted(content)[:4]}: expected `mean` and `var`.")
    for key, value in found.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {key} is a {type(value).__name__}, expected a tensor.")
    values = {key: _without_batch(value.float()) for key, value in found.items()}
    like = next(iter(values.values()))
    mean = values.get("mean", torch.zeros_like(like))
    var = values.get("var", torch.ones_like(like))
    if mean.shape != var.shape or mean.ndim != 3:
        raise ValueError(
            f"{path}: mean {tuple(mean.shape)} and var {tuple(var.shape)}, expected one shape "
            "[channels, height, width]."
        )
    if not (torch.isfinite(mean).all() and (var >= 0).all()):
        raise ValueError(f"{path}: expected finite means and variances of 0 or more; recompute it.")
    return LatentStats(mean=mean, var=var)


def _without_batch(value: Tensor) -> Tensor:
    """[1, C, H, W], which RAE's code takes as well, as [C, H, W]."""
    return value[0] if value.ndim == 4 and len(value) == 1 else value


def save_latent_stats(stats: LatentStats, path: str | Path) -> None:
    """Write statistics as safetensors with the keys `mean` and `var`, float32."""
    save_file({"mean": stats.mean.contiguous(), "var": stats.var.contiguous()}, path)
