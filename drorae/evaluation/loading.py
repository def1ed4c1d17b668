"""Finished stages as models, in eval mode: each output's `config.json` rebuilds its network."""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file

from drorae.config import from_json
from drorae.data.assets import asset_path
from drorae.diffusion.predictions import Prediction
from drorae.diffusion.times import TimeConfig
from drorae.evaluation.inference import Generator, Tokenizer
from drorae.models.decoder import Decoder, DecoderConfig
from drorae.models.dit import DiT, DiTConfig
from drorae.models.encoder import EncoderConfig, build_encoder
from drorae.models.fusion import FusionConfig, build_fusion
from drorae.models.matmul import NumberFormat
from drorae.store.workspace import StageOutput

__all__ = ["load_generator", "load_tokenizer"]

DECODER_STAGES = ("decoder", "finetune", "control")


def load_tokenizer(
    outputs: Mapping[str, StageOutput],
    *,
    device: torch.device | str = "cpu",
    encoder: EncoderConfig | None = None,
    precision: NumberFormat = "float32",
) -> Tokenizer:
    """Build the tokenizer from finished stages.

    Args:
        outputs: Stage outputs by name: `fusion` and at least one of decoder, finetune, control.
        device: Where the networks go.
        encoder: Configuration of the encoder; the one that the fusion was trained with unless
            given.
        precision: Number format of matrix products.

    Raises:
        ValueError: If a needed stage is missing.
    """
    stages = [s for s in DECODER_STAGES if s in outputs]
    if "fusion" not in outputs or not stages:
        raise ValueError(
            f"a tokenizer needs fusion and a decoder, got the stages {sorted(outputs)}: run the "
            "missing stage."
        )
    device = torch.device(device)
    config = outputs["fusion"].read_json("config.json")
    encoder_config = encoder or from_json(EncoderConfig, config["encoder"])
    backbone = build_encoder(encoder_config, asset_path).to(device)
    fusion_config = from_json(FusionConfig, config["model"])
    fusion = build_fusion(
        fusion_config,
        backbone.num_layers,
        backbone.width,
        layer_norm_eps=backbone.layer_norm_eps,
    )
    return Tokenizer(
        encoder=backbone,
        fusion=_loaded(fusion, outputs["fusion"], "fusion.safetensors", device),
        fusion_config=fusion_config,
        decoders={stage: _load_decoder(outputs[stage], device) for stage in stages},
        device=device,
        precision=precision,
    )


def load_generator(
    outputs: Mapping[str, StageOutput],
    *,
    device: torch.device | str = "cpu",
    precision: NumberFormat = "float32",
) -> Generator:
    """Build the generator (EMA weights) from the stages diffusion, latents and, if present, guide.

    Raises:
        ValueError: If diffusion or latents is missing.
    """
    if not {"diffusion", "latents"} <= set(outputs):
        raise ValueError(
            f"a generator needs diffusion and latents, got the stages {sorted(outputs)}: run the "
            "missing stage."
        )
    device = torch.device(device)
    config = outputs["diffusion"].read_json("config.json")
    stats = load_file(outputs["latents"].local("stats.safetensors"))
    guide = _load_dit(outputs["guide"], device) if "guide" in outputs else None
    return Generator(
        model=_load_dit(outputs["diffusion"], device),
        guide=guide,
        mean=stats["mean"].to(device),
        var=stats["var"].to(device),
        times=from_json(TimeConfig, config["times"]) if "times" in config else TimeConfig(),
        device=device,
        prediction=_prediction(outputs["diffusion"]),
        guide_prediction=_prediction(outputs["guide"]) if guide is not None else "velocity",
        precision=precision,
    )


def _prediction(output: StageOutput) -> Prediction:
    # Outputs from before there was a choice name none.
    return output.read_json("config.json").get("prediction", "velocity")


def _load_decoder(output: StageOutput, device: torch.device) -> Decoder:
    config = from_json(DecoderConfig, output.read_json("config.json")["model"])
    return _loaded(Decoder(config), output, "decoder.safetensors", device)


def _load_dit(output: StageOutput, device: torch.device) -> DiT:
    config = from_json(DiTConfig, output.read_json("config.json")["model"])
    return _loaded(DiT(config), output, "dit.safetensors", device)


def _loaded(module: Any, output: StageOutput, name: str, device: torch.device) -> Any:
    module.load_state_dict(load_file(output.local(name)))
    return module.to(device).eval().requires_grad_(False)
