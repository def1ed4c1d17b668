"""The equations of the reference once more, one operation a line, from a state dict alone.

Written from its description, not from our modules: eager attention, no fused norm, no shared
helper. Folders for `drorae.parity` with other sizes and options are made with it.
"""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]


def sub_state(state: State, prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def linear(x: Tensor, state: State, name: str) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def norm(x: Tensor, state: State, name: str, eps: float, rms: bool) -> Tensor:
    if rms:
        x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    else:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
    x = x * state[f"{name}.weight"] if f"{name}.weight" in state else x
    return x + state[f"{name}.bias"] if f"{name}.bias" in state else x


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.softmax(-1) @ v


def rotate(x: Tensor, rope: State) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = rope["freqs_cos"][:, 0::2], rope["freqs_sin"][:, 0::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = odd * cos + even * sin
    return out


def dit_block(x: Tensor, c: Tensor, state: State, rope: State, heads: int, rms: bool) -> Tensor:
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(
        F.silu(c), state, "adaLN_modulation.1"
    ).chunk(6, -1)
    batch, count, width = x.shape
    y = norm(x, state, "norm1", 1e-6, rms) * (1 + scale_a) + shift_a
    q, k, v = linear(y, state, "attn.qkv").reshape(batch, count, 3, heads, -1).unbind(2)
    q, k, v = (s.transpose(1, 2) for s in (q, k, v))
    if "attn.q_norm.weight" in state:
        eps = 1e-6 if rms else 1e-5  # torch's default LayerNorm there
        q, k = (norm(s, state, f"attn.{n}_norm", eps, rms) for s, n in ((q, "q"), (k, "k")))
    if rope:
        q, k = rotate(q, rope), rotate(k, rope)
    mixed = attention(q, k, v).transpose(1, 2).reshape(batch, count, width)
    x = x + gate_a * linear(mixed, state, "attn.proj")
    y = norm(x, state, "norm2", 1e-6, rms) * (1 + scale_m) + shift_m
    if "mlp.w12.weight" in state:
        gate, value = linear(y, state, "mlp.w12").chunk(2, -1)
        return x + gate_m * linear(F.silu(gate) * value, state, "mlp.w3")
    hidden = F.gelu(linear(y, state, "mlp.fc1"), approximate="tanh")
    return x + gate_m * linear(hidden, state, "mlp.fc2")


def embed(x: Tensor, state: State, name: str) -> Tensor:
    weight = state[f"{name}.proj.weight"]
    patches = F.unfold(x, weight.shape[-1], stride=weight.shape[-1]).transpose(1, 2)
    return patches @ weight.flatten(1).T + state[f"{name}.proj.bias"]


def pair(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value, value]


def velocity(config: dict[str, Any], state: State, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    rms, has_head = config.get("use_rmsnorm", True), isinstance(config["hidden_size"], list)
    depth, heads = pair(config["depth"])[0], pair(config["num_heads"])
    angles = t[:, None] * state["t_embedder.W"][None] * 2 * math.pi
    time = linear(torch.cat([angles.sin(), angles.cos()], -1), state, "t_embedder.mlp.0")
    time = linear(F.silu(time), state, "t_embedder.mlp.2")[:, None]
    label = state["y_embedder.embedding_table.weight"][y][:, None]
    c = F.silu(time + label) if has_head else time + label
    s = embed(x, state, "s_embedder" if has_head else "x_embedder")
    s = s + state["pos_embed"] if "pos_embed" in state else s
    rope = sub_state(state, "enc_feat_rope." if has_head else "feat_rope.")
    for i in range(depth):
        s = dit_block(s, c, sub_state(state, f"blocks.{i}."), rope, heads[0], rms)
    u, condition = s, c
    if has_head:
        condition = F.silu(time + s)
        if "s_projector.weight" in state:
            condition = linear(condition, state, "s_projector")
        u = embed(x, state, "x_embedder")
        condition = condition.repeat_interleave(u.shape[1] // s.shape[1], dim=1)
        rope = sub_state(state, "dec_feat_rope.")
        for i in range(depth, depth + config["depth"][1]):
            u = dit_block(u, condition, sub_state(state, f"blocks.{i}."), rope, heads[1], rms)
    shift, scale = linear(F.silu(condition), state, "final_layer.adaLN_modulation.1").chunk(2, -1)
    u = norm(u, state, "final_layer.norm_final", 1e-6, rms) * (1 + scale) + shift
    u = linear(u, state, "final_layer.linear")
    p = state["x_embedder.proj.weight"].shape[-1]
    side = math.isqrt(u.shape[1])
    u = u.reshape(len(x), side, side, p, p, -1)
    image = torch.einsum("nhwpqc->nchpwq", u).reshape(len(x), -1, side * p, side * p)
    return image[:, : x.shape[1]]  # the rest is learn_sigma's


def sample(velocity_at: Any, noise: Tensor, grid: Tensor) -> Tensor:
    x = noise
    for now, after in pairwise(grid):
        x = x + (after - now) * velocity_at(x, now.expand(len(x)))
    return x


def guided(
    settings: dict[str, Any], strong: Any, weak: Any, x: Tensor, t: Tensor, weak_y: Tensor
) -> Tensor:
    """`strong(x, t)` pushed away from `weak(x, t, weak_y)` where scale and interval say so."""
    low, high = settings["guidance_interval"]
    scale, v = settings["guidance_scale"], strong(x, t)
    if scale <= 1 or not low <= t[0].item() <= high:
        return v
    other = weak(x, t, weak_y)
    return other + scale * (v - other)


def dit_tensors(settings: dict[str, Any], state: State, weak: State | None, batch: int) -> State:
    """Inputs and expected outputs as in tests/golden/README.md."""
    model, generator = settings["model"], torch.Generator().manual_seed(3)
    shape = (batch, model["in_channels"], model["input_size"], model["input_size"])
    x, noise, clean, eps = (torch.randn(shape, generator=generator) for _ in range(4))
    t, loss_t = torch.rand(2, batch, generator=generator).clone().unbind(0)
    labels = torch.randint(0, model["num_classes"], (batch,), generator=generator)
    null = torch.full_like(labels, model["num_classes"])
    has_null = model.get("class_dropout_prob", 0.1) > 0
    y = torch.cat([labels[:-1], null[:1]]) if has_null else labels.clone()
    covered = torch.linspace(0, 0.999, settings["num_grid_points"])
    shift = settings["time_shift"]
    grid = shift * (1 - covered) / (1 + (shift - 1) * (1 - covered))

    def strong(x: Tensor, t: Tensor, y: Tensor = labels) -> Tensor:
        return velocity(model, state, x, t, y)

    share = loss_t.view(-1, 1, 1, 1)
    mixed = (1 - share) * clean + share * eps
    out = {"x": x, "t": t.clone(), "y": y, "noise": noise, "labels": labels, "time_grid": grid}
    out |= {
        "loss_clean": clean,
        "loss_noise": eps,
        "loss_t": loss_t.clone(),
        "velocity": strong(x, t, y),
    }
    out["loss"] = (strong(mixed, loss_t) - (eps - clean)).pow(2).mean()
    out["sample_unguided"] = sample(strong, noise, grid)
    if has_null:
        cfg = lambda x, t: guided(settings, strong, strong, x, t, null)  # noqa: E731
        out["sample_cfg"] = sample(cfg, noise, grid)
    if weak is not None:
        small = lambda x, t, y: velocity(settings["weak_model"], weak, x, t, y)  # noqa: E731
        auto = lambda x, t: guided(settings, strong, small, x, t, labels)  # noqa: E731
        out["sample_autoguidance"] = sample(auto, noise, grid)
    return out


def decode(fields: dict[str, Any], state: State, tokens: Tensor) -> Tensor:
    """`fields` under DecoderConfig's names."""
    x = linear(tokens, state, "decoder_embed")
    side, grid, px = math.isqrt(x.shape[1]), fields["grid"], fields["patch_px"]
    if side != grid:
        square = x.reshape(len(x), side, side, -1).permute(0, 3, 1, 2)
        square = F.interpolate(square, (grid, grid), mode="bilinear", align_corners=False)
        x = square.permute(0, 2, 3, 1).reshape(len(x), grid * grid, -1)
    x = torch.cat([state["trainable_cls_token"].repeat(len(x), 1, 1), x], 1)
    x = x + state["decoder_pos_embed"]
    for i in range(fields["layers"]):
        x = decoder_block(x, sub_state(state, f"decoder_layers.{i}."), fields)
    x = norm(x, state, "decoder_norm", fields["layer_norm_eps"], rms=False)
    x = linear(x, state, "decoder_pred")[:, 1:].reshape(len(x), grid, grid, px, px, 3)
    image = torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), 3, grid * px, grid * px)
    mean, std = (torch.tensor(fields[k]).view(1, 3, 1, 1) for k in ("image_mean", "image_std"))
    return image * std + mean


def decoder_block(x: Tensor, state: State, fields: dict[str, Any]) -> Tensor:
    eps, heads = fields["layer_norm_eps"], fields["heads"]
    y = norm(x, state, "layernorm_before", eps, rms=False)
    names = (f"attention.attention.{name}" for name in ("query", "key", "value"))
    q, k, v = (linear(y, state, n).reshape(*y.shape[:2], heads, -1).transpose(1, 2) for n in names)
    mixed = attention(q, k, v).transpose(1, 2).reshape(x.shape)
    x = x + linear(mixed, state, "attention.output.dense")
    y = linear(norm(x, state, "layernorm_after", eps, rms=False), state, "intermediate.dense")
    tanh = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y.pow(3))))
    exact = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    hidden = {"gelu": exact, "gelu_new": tanh, "silu": y * y.sigmoid(), "relu": y.clamp_min(0)}
    return x + linear(hidden[fields["hidden_act"]], state, "output.dense")


def write_dit(
    folder: Path, settings: dict[str, Any], state: State, weak: State | None, batch: int
) -> None:
    tensors = dit_tensors(settings, state, weak, batch)
    (folder / "dit_dh.json").write_text(json.dumps(settings))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "dit_dh_io.safetensors")
    save_file(state, folder / "dit_dh.safetensors")
    if weak is not None:
        save_file(weak, folder / "dit_dh_weak.safetensors")


def write_decoder(
    folder: Path,
    shown: dict[str, Any],
    fields: dict[str, Any],
    state: State,
    stats: State,
    token_side: int,
) -> None:
    """`shown` is what the file says, `fields` the same under DecoderConfig's names."""
    generator = torch.Generator().manual_seed(5)
    channels, side, eps = fields["latent_channels"], fields["grid"], fields["stats_eps"]
    tokens = torch.randn(3, token_side**2, channels, generator=generator)
    latent = torch.randn(2, channels, side, side, generator=generator)
    scale = (stats.get("var", torch.tensor(1.0)) + eps).sqrt()
    raw = (latent * scale + stats.get("mean", torch.tensor(0.0))).flatten(2).transpose(1, 2)
    io = {"tokens": tokens, "image_from_tokens": decode(fields, state, tokens)}
    io |= {"latent_normalised": latent, "image_from_normalised_latent": decode(fields, state, raw)}
    (folder / "rae_decoder.json").write_text(json.dumps(shown))
    save_file({k: v.contiguous() for k, v in io.items()}, folder / "rae_decoder_io.safetensors")
    save_file(state, folder / "rae_decoder.safetensors")
    torch.save(stats, folder / "latent_stats.pt")
