"""The fusion, forward and backward, against the loop over layers."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from bench_plain import PlainFusion, per_layer
from bench_timing import autocast, interleaved, peak_memory_mib, require_agreement
from torch import Tensor, nn

from drorae.models.fusion import DepthRoutedFusion, FusionConfig, build_fusion

LAYERS = 12
# batch, tokens, dim, hidden
SIZES = {
    "tiny": [(2, 16, 32, 64), (4, 16, 32, 16)],
    "small": [
        *((batch, 64, 384, 192) for batch in (4, 12, 24, 48)),
        *((8, tokens, 384, 192) for tokens in (16, 64, 256)),
        (24, 64, 384, 384),
        (4, 256, 768, 768),
        (2, 256, 768, 3072),
    ],
    "full": [
        *((batch, 256, 768, 3072) for batch in (4, 16, 64)),
        *((16, tokens, 768, 3072) for tokens in (64, 1024)),
        (64, 256, 768, 1536),
        (24, 64, 384, 192),
    ],
}
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # relative; sums in another order, and bf16's 2^-8


def build(size: tuple[int, int, int, int], device: torch.device) -> Any:
    batch, tokens, dim, hidden = size
    torch.manual_seed(0)
    fusion = build_fusion(FusionConfig(expert_hidden=hidden), LAYERS, dim)
    assert isinstance(fusion, DepthRoutedFusion)
    with torch.no_grad():
        for parameter in fusion.parameters():  # no equality by initialisation
            parameter.add_(0.02 * torch.randn_like(parameter))
    states = torch.randn(batch, LAYERS, tokens, dim).to(device)
    arriving = torch.randn(batch, tokens, dim).to(device)
    return fusion.to(device), PlainFusion(fusion).to(device), states, arriving


def step(module: nn.Module, states: Tensor, arriving: Tensor, precision: str) -> Tensor:
    module.zero_grad(set_to_none=True)
    with autocast(states.device, precision):
        result = module(states)
    latent = result if isinstance(result, Tensor) else result.latent
    latent.backward(arriving.to(latent.dtype))
    return latent


def check(fusion: nn.Module, plain: nn.Module, states: Tensor, arriving: Tensor) -> float:
    """Output and all gradients agree in float32.

    Raises:
        RuntimeError: They do not.
    """
    latent, other = (step(m, states, arriving, "float32") for m in (fusion, plain))
    grads = per_layer({n: p.grad for n, p in fusion.named_parameters() if p.grad is not None})
    others = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    return require_agreement(
        grads | {"latent": latent}, others | {"latent": other}, TOLERANCE["float32"]
    )


def rows(device: torch.device, sizes: str, precision: str, repeats: int) -> Iterator[dict]:
    for size in SIZES[sizes]:
        fusion, plain, states, arriving = build(size, device)
        error = check(fusion, plain, states, arriving)
        if precision != "float32":
            require_agreement(
                {"latent": step(fusion, states, arriving, precision)},
                {"latent": step(plain, states, arriving, precision)},
                TOLERANCE[precision],
            )
        modules = {"ours": fusion, "plain": plain}
        runs = {
            name: functools.partial(step, module, states, arriving, precision)
            for name, module in modules.items()
        }
        seconds = interleaved(runs, repeats, device)
        memory = {name: peak_memory_mib(run, device) for name, run in runs.items()}
        yield {
            **dict(zip(("batch", "tokens", "dim", "hidden"), size, strict=True)),
            "precision": precision,
            "plain_ms": 1e3 * seconds["plain"],
            "ours_ms": 1e3 * seconds["ours"],
            "speedup": seconds["plain"] / seconds["ours"],
            "ours_us_per_token": 1e6 * seconds["ours"] / (size[0] * size[1]),
            "max_rel_err_float32": error,
            "plain_peak_mib": memory["plain"],
            "ours_peak_mib": memory["ours"],
        }
