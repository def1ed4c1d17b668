"""Reading decoder weights and latent statistics written by others, strictly.

RAE's own loader is not strict and reports missing keys only in the log, so that a whole training
checkpoint silently gives a random decoder. Here the layout is recognised, the size is read from the
tensors, and any missing, extra or misshapen tensor is an error. Five layouts: a flat decoder; one
under RAE's `decoder.` prefix; a training checkpoint with `ema` and `model`; any of these with
`module.` or `_orig_mod.` from DDP and compile; any of these as safetensors. Pickles are read with
weights only.
"""

import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from drorae.models.decoder import Decoder, DecoderConfig
from drorae.models.encoder import IMAGENET_MEAN, IMAGENET_STD
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

WRAPPER_NAMES = frozenset({"module", "_orig_mod"})  # DistributedDataParallel, torch.compile
DECODER_PREFIX = "decoder."
# Shapes do not tell the number of heads. RAE's three sizes (arXiv:2510.11690, decoder configs).
HEADS_BY_WIDTH = {768: 12, 1024: 16, 1152: 16}


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportReport:
    """What was found in a file."""

    container: Literal["safetensors", "pickle"]
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
        ValueError: If it is no decoder, or any tensor is missing, extra or misshapen.
    """
    path = Path(path)
    content, container = _read(path)
    tensors, weights = _choose_weights(content, prefer, path)
    tensors, wrappers = _strip_wrappers(tensors, path)
    state, ignored, prefixed = _select_decoder(tensors, path)
    config = replace(_infer_config(state, heads, path), image_mean=image_mean, image_std=image_std)
    _check_complete(state, config, path)
    return ImportedDecoder(
        config=config,
        state={key: value.float().contiguous() for key, value in state.items()},
        report=ImportReport(
            container=container,
            weights=weights,
            rae_prefix=prefixed,
            wrappers=wrappers,
            ignored=ignored,
        ),
    )


def _read(path: Path) -> tuple[Mapping[str, Any], Literal["safetensors", "pickle"]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: expected decoder weights; check the path.")
    if path.suffix == ".safetensors":
        return load_file(path), "safetensors"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds objects other than tensors, or is no torch file: expected weights only; "
            "extract the state dict where the file was made."
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected a dict of tensors.")
    return content, "pickle"


def _choose_weights(
    content: Mapping[str, Any], prefer: Literal["ema", "model"], path: Path
) -> tuple[Mapping[str, Any], Literal["ema", "model", "plain"]]:
    """Take EMA or online weights of a training checkpoint; a state dict is taken as it is."""
    other: Literal["ema", "model"] = "model" if prefer == "ema" else "ema"
    for name in (prefer, other):
        if isinstance(content.get(name), Mapping):
            return content[name], name
    if not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(
            f"{path} holds no tensors under {sorted(content)[:8]}: expected a state dict or a "
            "checkpoint with `ema` or `model`."
        )
    return content, "plain"


def _strip_wrappers(
    tensors: Mapping[str, Any], path: Path
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Drop the name parts that DDP and compile add, wherever they stand."""
    found: set[str] = set()
    stripped: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: {key} is a {type(value).__name__}, expected a tensor; pass a state dict."
            )
        parts = key.split(".")
        found.update(WRAPPER_NAMES.intersection(parts))
        stripped[".".join(part for part in parts if part not in WRAPPER_NAMES)] = value
    return stripped, tuple(sorted(found))


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
    needed = (
        "decoder_pos_embed",
        "decoder_pred.weight",
        "decoder_layers.0.intermediate.dense.weight",
    )
    absent = [key for key in needed if key not in state]
    if absent:
        raise ValueError(f"{path} lacks {absent}: expected a complete RAE decoder; fetch it again.")
    width, channels = state["decoder_embed.weight"].shape
    num_heads = heads if heads is not None else HEADS_BY_WIDTH.get(width)
    if num_heads is None:
        raise ValueError(
            f"{path} has width {width}, whose number of heads the shapes do not tell: pass `heads`."
        )
    indices = {int(k.split(".")[1]) for k in state if k.startswith("decoder_layers.")}
    return DecoderConfig(
        latent_channels=channels,
        width=width,
        layers=max(indices) + 1,
        heads=num_heads,
        mlp_hidden=state["decoder_layers.0.intermediate.dense.weight"].shape[0],
        grid=math.isqrt(state["decoder_pos_embed"].shape[1] - 1),
        patch_px=math.isqrt(state["decoder_pred.weight"].shape[0] // 3),
        qkv_bias=any(key.endswith("attention.attention.query.bias") for key in state),
    )


def _check_complete(state: dict[str, Tensor], config: DecoderConfig, path: Path) -> None:
    """Compare every name and shape with a decoder built without memory."""
    with torch.device("meta"):
        expected = Decoder(config).state_dict()
    what = f"RAE decoder of {config.layers} layers, width {config.width}"
    check_tensors(state, expected, f"{path} is no complete {what}")


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
        ValueError: If it holds neither, shapes differ or are not [C, H, W], or a variance is
            negative.
    """
    path = Path(path)
    content, _ = _read(path)
    found = {k: content[k].float() for k in ("mean", "var") if isinstance(content.get(k), Tensor)}
    if not found:
        raise ValueError(f"{path} has the keys {sorted(content)[:4]}: expected `mean` and `var`.")
    like = next(iter(found.values()))
    mean = found.get("mean", torch.zeros_like(like))
    var = found.get("var", torch.ones_like(like))
    if mean.shape != var.shape or mean.ndim != 3:
        raise ValueError(
            f"{path}: mean {tuple(mean.shape)} and var {tuple(var.shape)}, expected one shape "
            "[channels, height, width]."
        )
    if not (torch.isfinite(mean).all() and (var >= 0).all()):
        raise ValueError(f"{path}: expected finite means and variances of 0 or more; recompute it.")
    return LatentStats(mean=mean, var=var)


def save_latent_stats(stats: LatentStats, path: str | Path) -> None:
    """Write statistics as safetensors with the keys `mean` and `var`, float32."""
    save_file({"mean": stats.mean.contiguous(), "var": stats.var.contiguous()}, path)
