"""Parts of the diffusion transformer: embeddings, attention, adaLN-zero blocks, output layer.

Attribute names follow the RAE reference, so that state-dict keys agree with released checkpoints.
Under autocast the parts that lost runs to NaN in bf16 stay in full precision: norms, the time
embedding, the adaLN of the trunk (one vector a sample, so this is cheap) and the residual stream,
which the transformer keeps in the type of its input. The per-token adaLN of the head runs in the
autocast type: in full precision it would cost more than the blocks themselves.
Source: RAE stage 2; LightningDiT; arXiv:2212.09748 (adaLN-zero).
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from drorae.models.matmul import Linear, linear
from drorae.models.rotary import RotaryPositions
from drorae.shapes import Float, Int, Tensor

__all__ = [
    "Attention",
    "Block",
    "FinalLayer",
    "GeluMlp",
    "LabelEmbedding",
    "PatchEmbedding",
    "RmsNorm",
    "SwiGlu",
    "TimeEmbedding",
    "drop_labels",
    "unpatchify",
]

NORM_EPS = 1e-6  # RAE stage 2, RMSNorm and LayerNorm of every block
NUM_FREQUENCIES = 256  # RAE stage 2, Gaussian Fourier features of t
EMBEDDING_STD = 0.02  # DiT: label table and time MLP


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast switched off, on devices that know autocast (the meta device does not)."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def drop_labels(
    labels: Int[Tensor, " batch"],
    probability: float,
    null_label: int,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " batch"]:
    """Replace each label by the null class with the given probability.

    Args:
        labels: Class of each sample.
        probability: Chance of a replacement.
        null_label: What stands for "no class".
        generator: Source of the draw, on any device; the global one of the labels' device if none.
    """
    device = labels.device if generator is None else generator.device
    draw = torch.rand(labels.shape, generator=generator, device=device).to(labels.device)
    return torch.where(draw < probability, null_label, labels)


def unpatchify(
    patches: Float[Tensor, "batch tokens values"], patch: int
) -> Float[Tensor, "batch channels height width"]:
    """Lay tokens, row-major and each (row, column, channel) with channels fastest, out as a map."""
    grid = math.isqrt(patches.shape[1])
    # [B, h, w, p, q, C] -> [B, C, h, p, w, q]
    cells = patches.reshape(patches.shape[0], grid, grid, patch, patch, -1)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, grid * patch, grid * patch)


class PatchEmbedding(nn.Module):
    """One linear map of each square patch to a token; its weight is that of a strided convolution.

    Computed as one matrix product, which spares the set-up of a convolution.

    Args:
        in_channels: Channels of the map.
        width: Channels of a token.
        patch: Side of a patch.
    """

    def __init__(self, in_channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch, stride=patch)
        nn.init.xavier_uniform_(self.proj.weight.data.view(width, -1))
        assert self.proj.bias is not None
        nn.init.zeros_(self.proj.bias)

    def forward(
        self, latent: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Tokens in row-major order, in the type of the input: the residual stream starts here."""
        patch = self.proj.kernel_size[0]
        grid = latent.shape[-1] // patch
        # [B, C, h, p, w, q] -> [B, h, w, C, p, q]
        cells = latent.reshape(len(latent), -1, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
        patches = cells.reshape(len(latent), grid * grid, -1)
        return linear(patches, self.proj.weight.flatten(1), self.proj.bias).to(latent.dtype)


class TimeEmbedding(nn.Module):
    """Random Fourier features of t and a two-layer network, in full precision.

    The frequencies `W` are drawn once, never trained and stored as a parameter (so does RAE). t is
    not scaled by 1000.

    Args:
        width: Channels of the embedding.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(NUM_FREQUENCIES), requires_grad=False)
        self.mlp = nn.Sequential(
            Linear(2 * NUM_FREQUENCIES, width), nn.SiLU(), Linear(width, width)
        )

    def reset(self) -> None:
        """Draw the weights from N(0, 0.02); biases keep what they have."""
        for layer in (self.mlp[0], self.mlp[2]):
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=EMBEDDING_STD)

    def forward(self, t: Float[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """Embedding of one time per sample, in the type of the weights."""
        with _full_precision(t.device):
            # In the reference's order of products: the same float32 angles to the last bit.
            angles = t[:, None] * self.W * 2 * math.pi
            features = torch.cat([angles.sin(), angles.cos()], dim=-1)
            return self.mlp(features.to(self.W.dtype))


class LabelEmbedding(nn.Module):
    """A learned vector for each class and for the null class.

    Args:
        num_rows: Classes, plus one if labels are dropped.
        width: Channels of the embedding.
        init_std: Standard deviation of the fresh vectors.
    """

    def __init__(self, num_rows: int, width: int, init_std: float = EMBEDDING_STD) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_rows, width)
        nn.init.normal_(self.embedding_table.weight, std=init_std)

    def forward(self, labels: Int[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """Look the labels up."""
        return self.embedding_table(labels)


class RmsNorm(nn.Module):
    """Root-mean-square norm in at least float32; the learned weight applies after the cast back.

    Args:
        width: Channels to normalise over.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, states: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Normalise the last axis."""
        if states.dtype in (torch.float32, torch.float64) and states.dtype == self.weight.dtype:
            return F.rms_norm(states, self.weight.shape, self.weight, NORM_EPS)
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        normed = F.rms_norm(wide, self.weight.shape, eps=NORM_EPS).to(states.dtype)
        return normed * self.weight


def _build_norm(width: int, use_rmsnorm: bool) -> nn.Module:
    if use_rmsnorm:
        return RmsNorm(width)
    return nn.LayerNorm(width, elementwise_affine=False, eps=NORM_EPS)


class Attention(nn.Module):
    """Self-attention with optional norms on queries and keys and optional rotary positions.

    Args:
        width: Channels of a token.
        num_heads: Heads; must divide `width`.
        use_qknorm: Normalise queries and keys over each head before the rotation.
        use_rmsnorm: Kind of that norm: RMSNorm, or LayerNorm with weight and bias.
    """

    def __init__(self, width: int, num_heads: int, *, use_qknorm: bool, use_rmsnorm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width)
        self.use_qknorm = use_qknorm
        norm = (RmsNorm if use_rmsnorm else nn.LayerNorm) if use_qknorm else nn.Identity
        self.q_norm, self.k_norm = norm(width // num_heads), norm(width // num_heads)
        self.proj = Linear(width, width)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"], rotary: RotaryPositions | None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Mix tokens; every token sees every other."""
        batch, count, width = tokens.shape
        # [B, N, 3*D] -> [3, B, heads, N, head_dim]
        packed = self.qkv(tokens).view(batch, count, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        matched, (values,) = packed.split((2, 1))  # queries and keys, turned together
        if self.use_qknorm:
            matched = torch.stack([self.q_norm(matched[0]), self.k_norm(matched[1])])
        if rotary is not None:
            matched = rotary(matched)
        # Norms and tables may have widened the type; the fused kernel needs one.
        queries, keys = matched.to(values.dtype)
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        return self.proj(mixed.transpose(1, 2).reshape(batch, count, width))


class SwiGlu(nn.Module):
    """Gated feed-forward part: `w3(silu(a) * b)` with (a, b) = `w12(x)`.

    Args:
        width: Channels of a token.
        hidden: Channels of each gate half.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = Linear(width, 2 * hidden)
        self.w3 = Linear(hidden, width)

    def forward(self, tokens: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Apply to each token."""
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class GeluMlp(nn.Module):
    """Two linear layers with a tanh GELU between them.

    Args:
        width: Channels of a token.
        hidden: Channels between the layers.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, tokens: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Apply to each token."""
        return self.fc2(F.gelu(self.fc1(tokens), approximate="tanh"))


def _build_modulation(width: int, num_chunks: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), Linear(width, num_chunks * width))


def _make_zero(linear: nn.Module) -> None:
    assert isinstance(linear, nn.Linear)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


def _modulation(
    layer: nn.Sequential, active: Float[Tensor, "batch length dim"], num_chunks: int
) -> tuple[Tensor, ...]:
    """Chunks of the last layer; the SiLU before it was applied once for the whole network."""
    is_per_sample = active.shape[1] == 1
    with _full_precision(active.device) if is_per_sample else nullcontext():
        return layer[-1](active).chunk(num_chunks, dim=-1)


class Block(nn.Module):
    """Pre-norm transformer block that a condition shifts, scales and gates (adaLN-zero).

    The condition has one vector a sample ([B, 1, D]) in a trunk and one a token ([B, N, D]) in a
    head. It comes with the SiLU of adaLN applied, which is the same for all blocks.

    Args:
        width: Channels of a token.
        num_heads: Attention heads.
        mlp_ratio: Hidden width over `width`; SwiGLU takes 2/3 of it.
        use_qknorm: See `Attention`.
        use_swiglu: SwiGLU or GELU feed-forward.
        use_rmsnorm: RMSNorm or LayerNorm without weights.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        use_qknorm: bool,
        use_swiglu: bool,
        use_rmsnorm: bool,
    ) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = _build_norm(width, use_rmsnorm)
        self.attn = Attention(width, num_heads, use_qknorm=use_qknorm, use_rmsnorm=use_rmsnorm)
        self.norm2 = _build_norm(width, use_rmsnorm)
        # int(2/3 * hidden), not hidden*2//3: the reference rounds the float (2730 at width 1024).
        self.mlp = SwiGlu(width, int(2 / 3 * hidden)) if use_swiglu else GeluMlp(width, hidden)
        self.adaLN_modulation = _build_modulation(width, 6)

    def reset(self) -> None:
        """Close both gates: the block passes its tokens on unchanged."""
        _make_zero(self.adaLN_modulation[-1])

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        active: Float[Tensor, "batch length dim"],
        rotary: RotaryPositions | None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Add the gated attention and feed-forward branches to the residual stream."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = _modulation(
            self.adaLN_modulation, active, 6
        )
        seen = torch.addcmul(shift_a, self.norm1(tokens), 1 + scale_a)
        tokens = torch.addcmul(tokens, gate_a, self.attn(seen, rotary))
        seen = torch.addcmul(shift_m, self.norm2(tokens), 1 + scale_m)
        return torch.addcmul(tokens, gate_m, self.mlp(seen))


class FinalLayer(nn.Module):
    """Modulated norm and a linear map of each token to its patch values; zero when fresh.

    Args:
        width: Channels of a token.
        num_values: Values of a patch.
        use_rmsnorm: RMSNorm or LayerNorm without weights.
    """

    def __init__(self, width: int, num_values: int, *, use_rmsnorm: bool) -> None:
        super().__init__()
        self.norm_final = _build_norm(width, use_rmsnorm)
        self.linear = Linear(width, num_values)
        self.adaLN_modulation = _build_modulation(width, 2)

    def reset(self) -> None:
        """Make the output zero whatever the input."""
        _make_zero(self.adaLN_modulation[-1])
        _make_zero(self.linear)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        active: Float[Tensor, "batch length dim"],
    ) -> Float[Tensor, "batch tokens values"]:
        """Patch values of each token, under a condition as of `Block`."""
        shift, scale = _modulation(self.adaLN_modulation, active, 2)
        return self.linear(torch.addcmul(shift, self.norm_final(tokens), 1 + scale))
