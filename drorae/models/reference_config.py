"""Configurations as others write them, turned into ours; without torch.

DiT: the constructor fields of the RAE reference (rae's DiTwDDTHead and LightningDiT). Decoder: our
own names, those of RAE's constructor, or a `vit_mae` config.json of transformers. A key that is not
known is an error, because it may change the result; only keys that cannot are passed over. Who
compares results afterwards may leave out what `unknown_dit_keys` and `unknown_decoder_keys` name.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from drorae.config import from_json
from drorae.models.dit_config import DiTConfig

__all__ = [
    "read_decoder_fields",
    "read_dit_config",
    "unknown_decoder_keys",
    "unknown_dit_keys",
    "without_keys",
]

# LightningDiT's own: the Fourier time embedding is the only one there is, and the second half of
# the outputs that learn_sigma adds is thrown away.
PLAIN_ONLY = {"use_gembed": (True,), "learn_sigma": (True, False)}
DIT_WHOLE = (
    "input_size",
    "in_channels",
    "hidden_size",
    "depth",
    "num_heads",
    "num_classes",
    "patch_size",
)

DECODER_NAMES = {
    "latent_channels": ("latent_channels", "latent_dim"),
    "width": ("width", "decoder_hidden_size"),
    "layers": ("layers", "decoder_num_hidden_layers"),
    "heads": ("heads", "decoder_num_attention_heads"),
    "mlp_hidden": ("mlp_hidden", "decoder_intermediate_size"),
    "grid": ("grid",),
    "patch_px": ("patch_px", "decoder_patch_size"),
    "layer_norm_eps": ("layer_norm_eps",),
    "qkv_bias": ("qkv_bias",),
    "hidden_act": ("hidden_act",),
    "image_mean": ("image_mean", "encoder_mean"),
    "image_std": ("image_std", "encoder_std"),
    "stats_eps": ("stats_eps", "eps"),
}
"""Our field (`stats_eps` is none of the decoder's), and the names under which it may stand."""

DECODER_WHOLE = ("latent_channels", "width", "layers", "heads", "mlp_hidden", "grid", "patch_px")
WRAPPERS = ("decoder", "decoder_config", "config", "model")

DECODER_UNUSED = frozenset(
    {
        # Replaced by RAE with the encoder's width and the decoder's own patch and image size.
        *("hidden_size", "patch_size", "image_size"),
        # Of the masked-autoencoder encoder, of training, or of transformers' book-keeping.
        *("num_hidden_layers", "num_attention_heads", "intermediate_size", "mask_ratio"),
        *("norm_pix_loss", "initializer_range", "hidden_dropout_prob"),
        *("attention_probs_dropout_prob", "architectures", "model_type", "torch_dtype", "dtype"),
        *("transformers_version", "_name_or_path", "chunk_size_feed_forward"),
    }
)
"""Keys of a `vit_mae` configuration that change nothing in evaluation."""


def read_dit_config(fields: Any, path: str = "model") -> DiTConfig:
    """Constructor fields of the reference as our configuration.

    Args:
        fields: Parsed JSON: lists of two for DiT-DH, single numbers for the plain model.
        path: Where they stand; appears in errors.

    Raises:
        ValueError: An unknown field, a wrong type, or sizes that do not fit.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"{path}={fields!r} is no configuration: expected constructor fields.")
    known = {k: _whole(v) if k in DIT_WHOLE else v for k, v in fields.items()}
    if not _is_plain(fields):
        known.setdefault("input_size", 1)  # the default of DiTwDDTHead, not the one of ours
        return from_json(DiTConfig, known, path)
    for name, allowed in PLAIN_ONLY.items():
        if known.pop(name, allowed[0]) not in allowed:
            raise ValueError(f"{path}.{name}={fields[name]!r}: expected one of {allowed}.")
    plain = {"hidden_size": 1152, "depth": 28, "num_heads": 16}
    return from_json(DiTConfig, {**plain, **known}, path)


def unknown_dit_keys(fields: Any) -> list[str]:
    """Keys that `read_dit_config` refuses, sorted."""
    if not isinstance(fields, Mapping):
        return []
    names = {field.name for field in dataclasses.fields(DiTConfig)}
    return sorted(fields.keys() - names - (PLAIN_ONLY.keys() if _is_plain(fields) else set()))


def _is_plain(fields: Mapping[str, Any]) -> bool:
    """Whether these are fields of LightningDiT, which has no head."""
    return not isinstance(fields.get("hidden_size", [0, 0]), list)


def read_decoder_fields(content: Mapping[str, Any], path: str = "decoder") -> dict[str, Any]:
    """Known fields of a decoder's configuration under our names, and `stats_eps` if it is there.

    Absent fields stay absent: tensor shapes tell most of them.

    Args:
        content: Parsed JSON, flat or under one of the names `decoder`, `config`, `model`.
        path: Where it stands; appears in errors.

    Raises:
        ValueError: An unknown key, two names of one field that disagree, or not three channels.
    """
    flat = _flatten(content, path)
    channels = flat.pop("num_channels", 3)
    if channels != 3:
        raise ValueError(
            f"{path}: num_channels={channels!r}; expected 3, as image mean and deviation have."
        )
    found: dict[str, Any] = {}
    for ours, names in DECODER_NAMES.items():
        values = {name: flat.pop(name) for name in names if name in flat}
        if len({str(value) for value in values.values()}) > 1:
            raise ValueError(f"{path}: {values} name one field and disagree; keep one of them.")
        for value in values.values():
            found[ours] = _whole(value) if ours in DECODER_WHOLE else value
    if "num_patches" in flat:
        found.setdefault("grid", math.isqrt(int(flat.pop("num_patches"))))
    unknown = unknown_decoder_keys(flat, path)
    if unknown:
        known = sorted(_decoder_names())
        raise ValueError(f"{path}: unknown key {unknown[0]!r}; expected some of {known}.")
    return found


def unknown_decoder_keys(content: Mapping[str, Any], path: str = "decoder") -> list[str]:
    """Keys that `read_decoder_fields` refuses, sorted; those inside a wrapping name by themselves.

    Raises:
        ValueError: If a key stands twice.
    """
    known = _decoder_names() | DECODER_UNUSED | {"num_channels", "num_patches"}
    return sorted(_flatten(content, path).keys() - known)


def without_keys(content: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """The content without some keys, also inside the names that `read_decoder_fields` looks into.

    Args:
        content: Parsed JSON.
        keys: What to leave out.
    """
    return {
        name: without_keys(value, keys) if isinstance(value, Mapping) else value
        for name, value in content.items()
        if name not in keys
    }


def _decoder_names() -> set[str]:
    return {name for names in DECODER_NAMES.values() for name in names}


def _flatten(content: Mapping[str, Any], path: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        inner = value if name in WRAPPERS and isinstance(value, Mapping) else {name: value}
        twice = flat.keys() & inner.keys()
        if twice:
            raise ValueError(f"{path}: {sorted(twice)[0]!r} stands twice; keep one of them.")
        flat |= inner
    return flat


def _whole(value: Any) -> Any:
    """Floats without fraction become integers, a square given as a pair becomes its side."""
    if isinstance(value, list | tuple):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
