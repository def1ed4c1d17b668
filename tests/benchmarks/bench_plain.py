"""Plain re-statements that the benchmarks measure against: no fusing, one layer after another.

`PlainFusion` is a loop over layers of nn.Linear, nn.LayerNorm and GELU. `plain_velocity` is DiT-DH
with separate query, key and value products, softmax attention written out and RMSNorm by hand.
Both hold copies of the weights of the module that they restate.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drorae.models.dit import DiT
from drorae.models.fusion import DepthRoutedFusion

Weights = dict[str, Tensor]


class PlainFusion(nn.Module):
    """arXiv:2605.10780, Eq. 1 to 5, energy weights."""

    def __init__(self, fusion: DepthRoutedFusion) -> None:
        super().__init__()
        stacked = fusion.experts
        num_layers, dim, hidden = stacked.up_weight.shape
        self.config = fusion.config
        self.up = nn.ModuleList(nn.Linear(dim, hidden) for _ in range(num_layers))
        self.norm = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(num_layers))
        self.down = nn.ModuleList(nn.Linear(hidden, dim) for _ in range(num_layers))
        self.backbone_norm = nn.LayerNorm(dim, eps=fusion.eps, elementwise_affine=False)
        self.router = nn.Linear(num_layers * dim, num_layers)
        with torch.no_grad():
            for name, value in per_layer(dict(fusion.named_parameters())).items():
                self.get_parameter(name).copy_(value)

    def forward(self, hidden: Tensor) -> Tensor:
        features = [self.backbone_norm(hidden[:, k]) for k in range(len(self.up))]
        experts = [
            self.backbone_norm(self.down[k](F.gelu(self.norm[k](self.up[k](feature)))))
            for k, feature in enumerate(features)
        ]
        raw = self.router(torch.cat(features, dim=-1))
        energy = raw.square().sum(dim=-1, keepdim=True)
        weights = raw / torch.sqrt(energy + self.config.energy_eps)
        total = weights[..., 0:1] * experts[0]
        for k in range(1, len(experts)):
            total = total + weights[..., k : k + 1] * experts[k]
        fused = self.backbone_norm(total)
        base = features[-1]
        return self.backbone_norm(base + self.config.beta * (fused - base))


def per_layer(stacked: Weights) -> Weights:
    """Tensors of a `DepthRoutedFusion` by name, under the names and shapes of `PlainFusion`."""
    found = {}
    for name, value in stacked.items():
        part, _, rest = name.partition(".")
        if part == "router":
            found[f"router.{rest.removeprefix('linear.')}"] = value
            continue
        module, kind = rest.split("_")
        for k, own in enumerate(value):
            is_matrix = kind == "weight" and module != "norm"
            found[f"{module}.{k}.{kind}"] = own.T if is_matrix else own[0]
    return found


def split_weights(named: Weights) -> Weights:
    """Tensors of a `DiT` by name, with fused matrices cut up: q, k, v and the halves of SwiGLU."""
    parts = {".attn.qkv.": ("q", "k", "v"), ".mlp.w12.": ("w1", "w2")}
    found = {}
    for name, value in named.items():
        fused = next((key for key in parts if key in name), None)
        if fused is None:
            found[name] = value
            continue
        for part, own in zip(parts[fused], value.chunk(len(parts[fused])), strict=True):
            start, end = name.split(fused)
            found[f"{start}{fused.rsplit('.', 2)[0]}.{part}.{end}"] = own
    return found


def plain_weights(model: DiT) -> Weights:
    """Own leaves for every parameter of a model, and its tables."""
    leaves = split_weights(
        {
            name: value.detach().clone().requires_grad_(value.requires_grad)
            for name, value in model.named_parameters()
        }
    )
    leaves = {
        name: value.detach().clone().requires_grad_(value.requires_grad)
        for name, value in leaves.items()
    }
    return leaves | {name: value.clone() for name, value in model.named_buffers()}


def plain_velocity(
    weights: Weights, model: DiT, noisy: Tensor, t: Tensor, labels: Tensor
) -> Tensor:
    """Velocity of a DiT-DH with patches of 1 from `plain_weights`."""
    trunk_depth = model.config.depths[0]
    angles = 2 * math.pi * t[:, None] * weights["t_embedder.W"]
    time = torch.cat([angles.sin(), angles.cos()], dim=-1)
    time = _linear(weights, "t_embedder.mlp.2", F.silu(_linear(weights, "t_embedder.mlp.0", time)))
    label = weights["y_embedder.embedding_table.weight"][labels]
    condition = F.silu(time + label)[:, None]
    tokens = _embed(weights, "s_embedder", noisy) + weights["pos_embed"]
    for index in range(trunk_depth):
        heads = model.config.heads[0]
        tokens = _block(weights, f"blocks.{index}", tokens, condition, "enc_feat_rope", heads)
    condition = F.silu(time[:, None] + tokens)
    if "s_projector.weight" in weights:
        condition = _linear(weights, "s_projector", condition)
    tokens = _embed(weights, "x_embedder", noisy)
    for index in range(trunk_depth, sum(model.config.depths)):
        heads = model.config.heads[1]
        tokens = _block(weights, f"blocks.{index}", tokens, condition, "dec_feat_rope", heads)
    shift, scale = _modulation(weights, "final_layer", condition, 2)
    tokens = _rms_norm(tokens, weights["final_layer.norm_final.weight"]) * (1 + scale) + shift
    values = _linear(weights, "final_layer.linear", tokens)
    return values.transpose(1, 2).reshape(noisy.shape).to(noisy.dtype)


def _block(
    weights: Weights, name: str, tokens: Tensor, condition: Tensor, rope: str, heads: int
) -> Tensor:
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = _modulation(weights, name, condition, 6)
    normed = _rms_norm(tokens, weights[f"{name}.norm1.weight"]) * (1 + scale_a) + shift_a
    tokens = tokens + gate_a * _attention(weights, f"{name}.attn", normed, rope, heads)
    normed = _rms_norm(tokens, weights[f"{name}.norm2.weight"]) * (1 + scale_m) + shift_m
    gate = F.silu(_linear(weights, f"{name}.mlp.w1", normed))
    value = _linear(weights, f"{name}.mlp.w2", normed)
    return tokens + gate_m * _linear(weights, f"{name}.mlp.w3", gate * value)


def _attention(weights: Weights, name: str, tokens: Tensor, rope: str, heads: int) -> Tensor:
    query, key, value = (
        _linear(weights, f"{name}.{part}", tokens).unflatten(-1, (heads, -1)).transpose(1, 2)
        for part in ("q", "k", "v")
    )
    query, key = (_turn(weights, rope, states) for states in (query, key))
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    mixed = torch.softmax(scores, dim=-1) @ value
    return _linear(weights, f"{name}.proj", mixed.transpose(1, 2).flatten(2))


def _turn(weights: Weights, rope: str, states: Tensor) -> Tensor:
    first, second = states[..., ::2], states[..., 1::2]
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return states * weights[f"{rope}.freqs_cos"] + turned * weights[f"{rope}.freqs_sin"]


def _rms_norm(tokens: Tensor, weight: Tensor) -> Tensor:
    wide = tokens.float()
    return wide / torch.sqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def _modulation(weights: Weights, name: str, condition: Tensor, parts: int) -> tuple[Tensor, ...]:
    full = _linear(weights, f"{name}.adaLN_modulation.1", F.silu(condition))
    return full.chunk(parts, dim=-1)


def _embed(weights: Weights, name: str, noisy: Tensor) -> Tensor:
    filters, bias = weights[f"{name}.proj.weight"], weights[f"{name}.proj.bias"]
    return F.conv2d(noisy, filters, bias).flatten(2).transpose(1, 2)


def _linear(weights: Weights, name: str, states: Tensor) -> Tensor:
    return F.linear(states, weights[f"{name}.weight"], weights[f"{name}.bias"])
