"""Weights in and out: released files become a stage output, a stage output becomes a file.

The layouts of foreign files are in `drorae.models.checkpoint_layout`. Nothing here trains or needs
Ray. What leaves are the averaged (EMA) weights, as evaluation and later stages use them.
"""

import os
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from drorae.checkpoint import load_weights, weights_bytes
from drorae.config import canonical_json, to_json
from drorae.models.checkpoint_layout import (
    ImportedDecoder,
    LatentStats,
    import_decoder,
    load_latent_stats,
    save_latent_stats,
)
from drorae.models.decoder import DecoderConfig
from drorae.models.encoder_config import EncoderConfig
from drorae.store import files
from drorae.store.content import PREFIX, content_id
from drorae.store.context import StageContext, StageResult
from drorae.store.workspace import StageOutput
from drorae.training.jobs import DecoderStage

__all__ = ["FileFormat", "commit_released", "export_stats", "export_weights"]

FileFormat = Literal["rae", "safetensors"]
"""`rae`: a flat state dict or `{mean, var}` as RAE's `.pt` files; `safetensors`: with the
configuration in the header."""

STATS_NAME = "stats.safetensors"
WEIGHTS_NAMES = {
    **dict.fromkeys(("decoder", "finetune", "control"), "decoder.safetensors"),
    "fusion": "fusion.safetensors",
    **dict.fromkeys(("diffusion", "guide"), "dit.safetensors"),
}
"""File of the averaged weights in each stage's output."""


def commit_released(
    ctx: StageContext, encoder: EncoderConfig, decoder: DecoderStage
) -> StageResult:
    """Write a released decoder as the `decoder` stage's output, after a check of every tensor.

    Statistics released with it lie beside it as `stats.safetensors`.

    Raises:
        FileNotFoundError: A file is not there, or `sha256:HEX` was not imported before.
        ValueError: The file is no decoder, or one of other sizes; names the settings that fit.
    """
    path = _local(ctx, decoder.released, "released")
    config = decoder.model
    imported = import_decoder(
        path, heads=config.heads, image_mean=config.image_mean, image_std=config.image_std
    )
    _check_sizes(imported, config, decoder.released)
    settings = {
        "encoder": to_json(encoder),
        "model": to_json(config),
        "released": {"source": decoder.released, "content": content_id(decoder.released)},
        "found": to_json(imported.report),
    }
    entries = [ctx.put_bytes("decoder.safetensors", weights_bytes(imported.state))]
    if decoder.released_stats:
        stats = load_latent_stats(_local(ctx, decoder.released_stats, "released_stats"))
        _check_stats(stats, config, decoder.released_stats)
        tensors = {"mean": stats.mean, "var": stats.var}
        entries.append(ctx.put_bytes(STATS_NAME, weights_bytes(tensors)))
        source, content = decoder.released_stats, content_id(decoder.released_stats)
        settings |= {"released_stats": {"source": source, "content": content}}
    return StageResult(files=[*entries, ctx.put_json("config.json", settings)])


def _local(ctx: StageContext, source: str, field: str) -> Path:
    if source.startswith(PREFIX):
        raise FileNotFoundError(
            f"decoder.{field}={source} is not in this workspace under these settings: expected "
            "what `drorae import` put there; import it with the same recipe, --set and workspace, "
            "or give the file's path."
        )
    return files.local_copy(os.path.expanduser(source), ctx.compute.cache_path or None)


def _check_sizes(imported: ImportedDecoder, config: DecoderConfig, source: str) -> None:
    found, wanted = to_json(imported.config), to_json(config)
    # The file does not hold these two; every tensor has the same shape whatever they are.
    free = {"heads", "layer_norm_eps"}
    wrong = [name for name in found if found[name] != wanted[name] and name not in free]
    if wrong:
        flags = " ".join(f"--set decoder.model.{name}={found[name]}" for name in wrong)
        raise ValueError(
            f"decoder.released={source} does not fit decoder.model: the file has "
            f"{', '.join(f'{name}={found[name]} instead of {wanted[name]}' for name in wrong)}. "
            f"Use {flags}, or the file that was meant."
        )


def _check_stats(stats: LatentStats, config: DecoderConfig, source: str) -> None:
    expected = (config.latent_channels, config.grid, config.grid)
    if tuple(stats.mean.shape) != expected:
        raise ValueError(
            f"decoder.released_stats={source} has shape {tuple(stats.mean.shape)}: expected "
            f"{expected}, the latents of this decoder. RAE has one file for each image size."
        )


def export_weights(output: StageOutput, path: str | Path, file_format: FileFormat) -> int:
    """Write the averaged weights of a stage's output to a file; returns their number of tensors.

    Args:
        output: Output of any stage in `WEIGHTS_NAMES`.
        path: File to write.
        file_format: Its layout.
    """
    manifest = output.manifest
    state = load_weights(str(output.local(WEIGHTS_NAMES[manifest.stage])))
    if file_format == "rae":
        torch.save(state, path)
    else:
        config = canonical_json(output.read_json("config.json"))
        facts = {"stage": manifest.stage, "key": manifest.key, "weights": "ema", "config": config}
        save_file(state, path, metadata=facts)
    return len(state)


def export_stats(output: StageOutput, path: str | Path, file_format: FileFormat) -> None:
    """Write the latent statistics of the `latents` or of an imported `decoder` output to a file.

    Raises:
        FileNotFoundError: If the output holds none.
    """
    stats = load_latent_stats(output.local(STATS_NAME))
    if file_format == "rae":
        torch.save({"mean": stats.mean, "var": stats.var}, path)
    else:
        save_latent_stats(stats, path)
