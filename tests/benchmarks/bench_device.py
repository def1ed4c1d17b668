"""Throughput of whole parts in bfloat16: MFU of training steps, compilation, encoder and fusion.

Made for a GPU; runs on a CPU at tiny sizes so that the code is tried before it costs GPU time.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench_diffusion import TINY
from bench_timing import (
    autocast,
    count_flops,
    interleaved,
    peak_memory_mib,
    peak_tflops,
    relative_error,
)
from torch import Tensor, nn

from drorae.models.decoder import Decoder, DecoderConfig, decoder_preset
from drorae.models.dit import DiT, DiTConfig, dit_preset
from drorae.models.encoder import Encoder
from drorae.models.encoder_config import EncoderConfig
from drorae.models.fusion import FusionConfig, build_fusion

PRECISION = "bfloat16"
COMPILE_TOLERANCE = 5e-2  # relative, bf16: fused kernels round fewer times
# name, configuration, batches to try; the last that fits gives the MFU
TRAINING: dict[str, list[tuple[str, DiTConfig, list[int]]]] = {
    "tiny": [("tiny", TINY, [2])],
    "small": [("DiT-DH-S", dit_preset("DiT-DH-S"), [1])],
    "full": [
        ("DiT-DH-S", dit_preset("DiT-DH-S"), [32, 128, 256]),
        ("DiT-DH-XL", dit_preset("DiT-DH-XL"), [16, 32, 64]),
    ],
}


def mfu_rows(device: torch.device, sizes: str, repeats: int) -> Iterator[dict]:
    """Forward, backward and AdamW of a DiT-DH, eager and compiled."""
    for name, config, batches in TRAINING[sizes]:
        flops = count_flops(DiT(config), lambda config=config: _dit_inputs(config, 1))
        for batch in batches:
            for compiled in (False, True):
                try:
                    yield _mfu_row(name, config, batch, compiled, flops, repeats, device)
                except torch.OutOfMemoryError:
                    yield {
                        "model": name,
                        "batch": batch,
                        "compiled": compiled,
                        "out_of_memory": True,
                    }
                torch._dynamo.reset()
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def _mfu_row(
    name: str,
    config: DiTConfig,
    batch: int,
    compiled: bool,
    flops_per_image: int,
    repeats: int,
    device: torch.device,
) -> dict:
    torch.manual_seed(0)
    model = DiT(config).to(device).eval()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    inputs = tuple(x.to(device) for x in _dit_inputs(config, batch))
    predict = torch.compile(model) if compiled else model

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with autocast(device, PRECISION):
            velocity = predict(*inputs)
        (velocity - inputs[0]).square().mean().backward()
        optimiser.step()

    seconds = interleaved({"step": step}, repeats, device)["step"]
    achieved = flops_per_image * batch / seconds / 1e12
    peak = peak_tflops(device)
    return {
        "model": name,
        "batch": batch,
        "tokens": config.input_size**2,
        "compiled": compiled,
        "step_ms": 1e3 * seconds,
        "images_per_s": batch / seconds,
        "gflops_per_image": flops_per_image / 1e9,
        "tflops_per_s": achieved,
        "peak_tflops_per_s": peak,
        "mfu": None if peak is None else achieved / peak,
        "peak_mib": peak_memory_mib(step, device),
    }


def _dit_inputs(config: DiTConfig, batch: int) -> tuple[Tensor, ...]:
    side = config.input_size
    noisy = torch.randn(batch, config.in_channels, side, side)
    return noisy, torch.rand(batch), torch.zeros(batch, dtype=torch.long)


def compile_rows(device: torch.device, sizes: str, repeats: int) -> Iterator[dict]:
    """Fusion and decoder, forward and backward, eager against compiled.

    Raises:
        RuntimeError: Compiled and eager results differ.
    """
    for name, module, tokens in _parts(sizes):
        torch.manual_seed(0)
        module, states = module.to(device), tokens.to(device)
        torch._dynamo.reset()
        variants: dict[str, Any] = {
            "eager": module,
            "compiled": torch.compile(module, fullgraph=True),
        }

        def step(variant: Any, module: nn.Module = module, states: Tensor = states) -> Tensor:
            module.zero_grad(set_to_none=True)
            with autocast(states.device, PRECISION):
                result = variant(states)
            tensor = result if isinstance(result, Tensor) else result.latent
            tensor.float().square().mean().backward()
            return tensor

        error = relative_error(step(variants["compiled"]), step(variants["eager"]))
        if error > COMPILE_TOLERANCE:
            raise RuntimeError(f"{name}: compiled differs from eager by {error:.2e} relative.")
        runs = {key: lambda v=v: step(v) for key, v in variants.items()}
        seconds = interleaved(runs, repeats, device)
        memory = {key: peak_memory_mib(run, device) for key, run in runs.items()}
        yield {
            "part": name,
            "batch": len(states),
            "eager_ms": 1e3 * seconds["eager"],
            "compiled_ms": 1e3 * seconds["compiled"],
            "speedup": seconds["eager"] / seconds["compiled"],
            "rel_err": error,
            "eager_peak_mib": memory["eager"],
            "compiled_peak_mib": memory["compiled"],
        }


def _parts(sizes: str) -> Iterator[tuple[str, nn.Module, Tensor]]:
    if sizes == "tiny":
        decoder = DecoderConfig(
            latent_channels=32, width=16, layers=2, heads=2, mlp_hidden=24, grid=4, patch_px=2
        )
        yield (
            "fusion",
            build_fusion(FusionConfig(expert_hidden=64), 4, 32),
            torch.randn(2, 4, 16, 32),
        )
        yield "decoder", Decoder(decoder), torch.randn(2, 16, 32)
        return
    batch = 2 if sizes == "small" else 32
    hidden = 768 if sizes == "small" else 3072
    fusion = build_fusion(FusionConfig(expert_hidden=hidden), 12, 768)
    yield "fusion", fusion, torch.randn(batch, 12, 256, 768)
    size = "ViT-B" if sizes == "small" else "ViT-XL"
    yield f"decoder {size}", Decoder(decoder_preset(size)), torch.randn(batch, 256, 768)


def encoding_rows(device: torch.device, sizes: str, repeats: int) -> Iterator[dict]:
    """Images to latents without gradients: the encoder of the paper with random weights."""
    side, patch, width, depth, heads = (
        (16, 4, 32, 4, 2) if sizes == "tiny" else (224, 14, 768, 12, 12)
    )
    batches = {"tiny": [2], "small": [1, 4], "full": [16, 64, 256]}[sizes]
    encoder = build_encoder(side, patch, width, depth, heads).to(device)
    fusion = build_fusion(FusionConfig(expert_hidden=4 * width), depth, width).to(device).eval()
    for batch in batches:
        images = torch.rand(batch, 3, side, side, device=device)

        @torch.no_grad()
        def encode(images: Tensor = images, fuse: Callable[..., Any] = fusion) -> object:
            with autocast(device, PRECISION):
                return fuse(encoder(images))

        runs = {"fused": encode, "encoder": lambda run=encode: run(fuse=lambda hidden: hidden)}
        seconds = interleaved(runs, repeats, device)
        yield {
            "batch": batch,
            "image_px": side,
            "encoder_images_per_s": batch / seconds["encoder"],
            "encoder_fusion_images_per_s": batch / seconds["fused"],
            "fusion_share": 1 - seconds["encoder"] / seconds["fused"],
            "peak_mib": peak_memory_mib(encode, device),
        }


def build_encoder(side: int, patch: int, width: int, depth: int, heads: int) -> Encoder:
    """DINOv2 with registers of the given size; ViT-B/14 is the paper's."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(0)
    settings = Dinov2WithRegistersConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        patch_size=patch,
        image_size=side,
    )
    config = EncoderConfig(
        source="random:dinov2_with_registers",
        input_px=side,
        patch_px=patch,
        width=width,
        depth=depth,
    )
    return Encoder(config, Dinov2WithRegistersModel(settings))
