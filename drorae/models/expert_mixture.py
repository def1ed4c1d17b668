"""The experts' arithmetic, forward and backward, in blocks of layers.

Per layer k, with x = LN(z(k)) given: u = x W1 + b1, a = act(LN(u) * gamma + beta), h = LN(a W2 +
b2), and the result is sum_k m_gk h_k for each row g of the mixing weights. Written as one function
of autograd for three reasons. It keeps two tensors a layer for the backward pass, u and h, where
autograd keeps six. Neither the experts' outputs nor their gradients ever lie side by side for all
layers. And under autocast every pass between the products moves the narrow type.

A block is as many layers as fit `CPU_BLOCK_BYTES` (the share of a core in its cache) or
`DEVICE_BLOCK_BYTES` on an accelerator, where that is normally all of them: one batched product for
the lot. Blocks also bound what the backward pass holds when it recomputes.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from drorae.models.matmul import batched_product, suits_onednn
from drorae.models.stacked_norm import (
    NormInput,
    normalise,
    normalise_backward,
    rescaled,
    stacked_norm,
    stacked_norm_backward,
)
from drorae.shapes import Float, Tensor

__all__ = ["HIDDEN_NORM_EPS", "ExpertParameters", "ExpertSettings", "mix_experts"]

HIDDEN_NORM_EPS = 1e-5  # torch's LayerNorm default; the paper gives none for the experts' own norm
CPU_BLOCK_BYTES = 5 << 18  # 2026-11-24, EPYC with 1 MB of L2: 1.03x over 1 MB up to 256 tokens
DEVICE_BLOCK_BYTES = 1 << 30  # all 12 layers of 64 images at hidden width 3072 need 1.2 GB


class ExpertParameters(NamedTuple):
    """Stacked parameters; the first axis is the layer."""

    up_weight: Float[Tensor, "layers dim hidden"]
    up_bias: Float[Tensor, "layers 1 hidden"]
    norm_weight: Float[Tensor, "layers 1 hidden"]
    norm_bias: Float[Tensor, "layers 1 hidden"]
    down_weight: Float[Tensor, "layers hidden dim"]
    down_bias: Float[Tensor, "layers 1 dim"]


class ExpertSettings(NamedTuple):
    """What is no tensor."""

    gelu: bool
    """GELU after the hidden LayerNorm, or nothing."""
    eps: float
    """Epsilon of the LayerNorm on the output."""
    recompute: bool
    """Recompute a block in the backward pass instead of keeping u and h."""


def mix_experts(
    features: Float[Tensor, "batch layers tokens dim"],
    mixing: Float[Tensor, "batch tokens rows layers"] | None,
    parameters: ExpertParameters,
    settings: ExpertSettings,
) -> Tensor:
    """Weighted sums of the experts' outputs, [B, N, rows, C]; without weights all, [B, L, N, C].

    Args:
        features: Normalised layers.
        mixing: Weight of each layer in each row of the result; none: no sum.
        parameters: The experts', in the type of the features.
        settings: Activation, epsilon, recomputation.
    """
    out = _ExpertMixture.apply(settings, features, mixing, *parameters)
    assert isinstance(out, Tensor)
    return out


class _Activations(NamedTuple):
    """What one block keeps for the backward pass."""

    hidden: Tensor
    """u, or LN(u) if the block has several layers, [k, M, hidden]."""
    hidden_mean: Tensor
    hidden_rstd: Tensor
    output: Tensor
    """h, [k, M, C]."""
    output_rstd: Tensor


class _ExpertMixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: ExpertSettings,
        features: Tensor,
        mixing: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        stacked = ExpertParameters(*parameters)
        kept: list[Tensor] = []
        sink = _Sink(features, mixing)
        ctx.blocks = _blocks(features, stacked)
        for layers in ctx.blocks:
            block = _run_block(_rows(features, layers), _take(stacked, layers), settings)
            sink.add(layers, block.output)
            if not settings.recompute:
                kept += block
        ctx.settings = settings
        ctx.save_for_backward(features, mixing, *parameters, *kept)
        return sink.result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - hidden by the decorator
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        features, mixing, *saved = ctx.saved_tensors
        stacked, kept = ExpertParameters(*saved[:6]), saved[6:]
        grads = ExpertParameters(*(torch.empty_like(p) for p in stacked))
        source, size = _Source(grad, mixing), len(_Activations._fields)
        into = torch.empty_like(features) if ctx.needs_input_grad[1] else None
        for index, layers in enumerate(ctx.blocks):
            own, x = _take(stacked, layers), _rows(features, layers)
            block = (
                _run_block(x, own, ctx.settings)
                if ctx.settings.recompute
                else _Activations(*kept[size * index : size * (index + 1)])
            )
            arriving = source.take(layers, block.output)
            to_states = _backward_block(
                x, own, block, arriving, _take(grads, layers), ctx.settings.gelu
            )
            if into is not None:
                to_input = batched_product(to_states, own.up_weight.transpose(1, 2))
                into[:, layers] = to_input.unflatten(1, (len(features), -1)).transpose(0, 1)
        return None, into, source.to_mixing, *grads


def _run_block(x: Tensor, own: ExpertParameters, settings: ExpertSettings) -> _Activations:
    states = batched_product(x, own.up_weight, own.up_bias)
    active, kept = stacked_norm(states, own.norm_weight, own.norm_bias, HIDDEN_NORM_EPS)
    if settings.gelu:
        active = F.gelu(active)
    raw = batched_product(active, own.down_weight, own.down_bias)
    return _Activations(*kept, *normalise(raw, settings.eps))


def _backward_block(
    x: Tensor,
    own: ExpertParameters,
    block: _Activations,
    to_output: Tensor,
    grads: ExpertParameters,
    gelu: bool,
) -> Tensor:
    """Fill the block's parameter gradients; return the gradient at u."""
    to_raw = normalise_backward(to_output, block.output, block.output_rstd)
    norm, kept = (own.norm_weight, own.norm_bias), NormInput(*block[:3])
    scaled = rescaled(kept, *norm, HIDDEN_NORM_EPS)
    active = F.gelu(scaled) if gelu else scaled
    batched_product(active.transpose(1, 2), to_raw, out=grads.down_weight)
    torch.sum(to_raw, 1, keepdim=True, out=grads.down_bias)
    to_scaled = batched_product(to_raw, own.down_weight.transpose(1, 2))
    if gelu:
        to_scaled = torch.ops.aten.gelu_backward(to_scaled, scaled)
    into = {"to_weight": grads.norm_weight, "to_bias": grads.norm_bias}
    to_states = stacked_norm_backward(to_scaled, kept, *norm, **into)
    batched_product(x.transpose(1, 2), to_states, out=grads.up_weight)
    torch.sum(to_states, 1, keepdim=True, out=grads.up_bias)
    return to_states


class _Sink:
    """Collects what the blocks give: their weighted sum, or all of them."""

    def __init__(self, features: Tensor, mixing: Tensor | None) -> None:
        batch, _, tokens, dim = features.shape
        self.sums = self.weights = None
        if mixing is None:
            self.result = torch.empty_like(features, memory_format=torch.contiguous_format)
        else:
            self.weights = mixing.flatten(0, 1)  # [M, rows, L]
            self.result = features.new_zeros(batch, tokens, mixing.shape[2], dim)
            self.sums = self.result.flatten(0, 1)

    def add(self, layers: slice, output: Tensor) -> None:
        if self.sums is None or self.weights is None:
            self.result[:, layers] = output.unflatten(1, (len(self.result), -1)).transpose(0, 1)
        elif len(output) == 1:  # spares M tiny products
            self.sums.addcmul_(self.weights[..., layers], output[0][:, None])
        else:
            self.sums.baddbmm_(self.weights[..., layers], output.transpose(0, 1))


class _Source:
    """Gives each block the gradient at its outputs; collects the gradient of the weights."""

    def __init__(self, grad: Tensor, mixing: Tensor | None) -> None:
        self.grad = grad
        self.to_mixing = None
        if mixing is not None:
            self.sums = grad.flatten(0, 1)  # [M, rows, C]
            self.weights = mixing.flatten(0, 1)
            self.to_mixing = torch.empty_like(mixing, memory_format=torch.contiguous_format)
            self.to_weights = self.to_mixing.flatten(0, 1)

    def take(self, layers: slice, output: Tensor) -> Tensor:
        if self.to_mixing is None:
            return self.grad[:, layers].transpose(0, 1).flatten(1, 2)
        weights, by_token = self.weights[..., layers], output.transpose(0, 1)  # [M, k, C]
        if len(output) == 1:
            self.to_weights[..., layers] = (self.sums * by_token).sum(-1, keepdim=True)
        else:
            self.to_weights[..., layers] = torch.bmm(self.sums, by_token.transpose(1, 2))
        if weights.shape[1] == 1:
            return weights.permute(2, 0, 1) * self.sums.transpose(0, 1)
        return torch.bmm(weights.transpose(1, 2), self.sums).transpose(0, 1).contiguous()


def _blocks(features: Tensor, stacked: ExpertParameters) -> list[slice]:
    batch, num_layers, tokens, dim = features.shape
    widest = max(dim, stacked.up_weight.shape[-1])
    layer_bytes = batch * tokens * widest * features.element_size()
    if features.device.type != "cpu":
        step = max(1, DEVICE_BLOCK_BYTES // layer_bytes)
    else:
        step = max(1, CPU_BLOCK_BYTES // layer_bytes)
        one_product = batch * tokens * stacked.up_weight[0].numel()
        if not (torch.compiler.is_compiling() or suits_onednn(features, stacked[0], one_product)):
            # MKL gives each thread whole layers: 3 on two threads take as long as 4.
            threads = torch.get_num_threads()
            step -= step % threads if step > threads else 0
    return [slice(first, first + step) for first in range(0, num_layers, step)]


def _rows(features: Tensor, layers: slice) -> Tensor:
    """A block's tokens, [B, L, N, C] -> [k, B * N, C]."""
    return features[:, layers].transpose(0, 1).flatten(1, 2)


def _take(stacked: ExpertParameters, layers: slice) -> ExpertParameters:
    return ExpertParameters(*(p[layers] for p in stacked))
