"""Depth experts, router and aggregations: the learned parts of a fusion.

All layers are computed together: parameters are stacked along the layer axis and the experts are
batched matrix products; `drorae.models.expert_mixture` has their arithmetic.

Start: every expert begins as the identity on its normalised layer (exactly when `expert_hidden` is
at least twice the width, or the width without activation; otherwise a projection on a random
subspace, of half the rank of `expert_hidden`, or of all of it where that is less than half the
width), and the router begins with weight 1 on the last layer and almost 0 elsewhere. So z_fuse
starts as z_base and step 0 reconstructs like RAE. The paper gives no initialisation; a zero last
matrix is not usable, because LayerNorm of zeros has gradients of order 1 / sqrt(eps).
"""

import math
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from drorae.models.expert_mixture import ExpertParameters, ExpertSettings, mix_experts
from drorae.models.fusion_config import FusionConfig
from drorae.models.layers import grid_side
from drorae.models.matmul import Linear
from drorae.shapes import Float, Tensor

__all__ = ["Experts", "LayerAttention", "Router", "depth_groups", "router_view", "routing_penalty"]

ROUTER_INIT_STD = (
    0.02  # of one raw weight on unit-variance input: turns z_final by less than 1 degree
)
GELU_SHIFT = 3.0  # GELU(n + 3) of unit-variance n is a straight line to 3 percent
SOFTMAX_LAST_LOGIT = 6.0  # softmax over 12 layers: 0.97 on the last


class Experts(nn.Module):
    """One network per encoder layer: Linear, LayerNorm, activation, Linear (Eq. 2, appendix).

    Args:
        num_layers: Experts.
        dim: Channels in and out.
        hidden: Width of the hidden layer.
        activation: `gelu` or `none`.
        eps: Epsilon of the non-affine LayerNorm on the output.
        recompute: Recompute activations in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        num_layers: int,
        dim: int,
        hidden: int,
        activation: Literal["gelu", "none"],
        *,
        eps: float,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.eps = eps
        self.recompute = recompute
        self.up_weight = nn.Parameter(torch.empty(num_layers, dim, hidden))
        self.up_bias = nn.Parameter(torch.zeros(num_layers, 1, hidden))
        self.norm_weight = nn.Parameter(torch.ones(num_layers, 1, hidden))
        self.norm_bias = nn.Parameter(torch.zeros(num_layers, 1, hidden))
        self.down_weight = nn.Parameter(torch.empty(num_layers, hidden, dim))
        self.down_bias = nn.Parameter(torch.zeros(num_layers, 1, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start every expert as the identity, or as a projection where it is too narrow."""
        dim, hidden = self.up_weight.shape[1:]
        is_shifted = self.activation == "gelu" and hidden < dim / 2
        paired = self.activation == "gelu" and not is_shifted
        for up, down in zip(self.up_weight, self.down_weight, strict=True):
            _fill_identity(up, down, paired=paired)
        self.norm_bias.fill_(GELU_SHIFT if is_shifted else 0.0)
        level = F.gelu(self.norm_bias) if is_shifted else self.norm_bias
        self.down_bias.copy_(-level @ self.down_weight)

    def forward(
        self, normalised: Float[Tensor, "batch layers tokens dim"]
    ) -> Float[Tensor, "batch layers tokens dim"]:
        """h_k = LN(e_k(LN(z(k)))) for every layer; the input is already normalised."""
        return self._mix(normalised, None)

    def mixed(
        self,
        normalised: Float[Tensor, "batch layers tokens dim"],
        weights: Float[Tensor, "batch tokens layers"],
    ) -> Float[Tensor, "batch tokens dim"]:
        """Sum of w_k h_k over the layers, without holding the h_k side by side."""
        return self._mix(normalised, weights[:, :, None])[:, :, 0]

    def mixed_in_groups(
        self,
        normalised: Float[Tensor, "batch layers tokens dim"],
        weights: Float[Tensor, "batch tokens layers"],
        groups: list[slice],
    ) -> tuple[Float[Tensor, "batch tokens dim"], ...]:
        """The same sum over each group of layers."""
        rows = weights.new_zeros(len(groups), weights.shape[-1])
        for row, layers in zip(rows, groups, strict=True):
            row[layers] = 1.0
        return self._mix(normalised, weights[:, :, None] * rows).unbind(2)

    def _mix(self, normalised: Tensor, mixing: Tensor | None) -> Tensor:
        kind = normalised.device.type
        # The meta device knows no autocast.
        is_narrow = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if is_narrow else normalised.dtype
        names = ExpertParameters._fields
        parameters = ExpertParameters(*(getattr(self, name).to(dtype) for name in names))
        mixing = None if mixing is None else mixing.to(dtype)
        settings = ExpertSettings(self.activation == "gelu", self.eps, self.recompute)
        return mix_experts(normalised.to(dtype), mixing, parameters, settings)


def _fill_identity(up: Tensor, down: Tensor, paired: bool) -> None:
    """Make down(act(norm(up(x)))) a positive multiple of x, as far as the width allows.

    GELU(a) - GELU(-a) = a, so columns that come as (q, -q) with weights (q, -q) behind them pass
    q.x unchanged; opposite columns also keep the hidden mean at 0, so that the hidden LayerNorm
    only scales. Without activation single columns do, and with the hidden units moved to where GELU
    is almost straight. Remaining columns are random features with no
    weight yet. Columns have norm 1: unit-variance output on normalised input.
    """
    dim, hidden = up.shape
    usable = hidden // 2 if paired else hidden
    rank = min(usable, dim)
    passed = torch.eye(dim) if rank == dim else nn.init.orthogonal_(torch.empty(rank, dim))
    spare = torch.randn(usable - rank, dim) / math.sqrt(dim)
    columns = torch.cat([passed, spare]).T
    weights = torch.cat([passed, torch.zeros_like(spare)])
    up.normal_(std=dim**-0.5)
    down.zero_()
    up[:, :usable], down[:usable] = columns, weights
    if paired:
        up[:, usable : 2 * usable], down[usable : 2 * usable] = -columns, -weights


class Router(nn.Module):
    """Signed weight of every layer for every token: one linear map, no softmax (Eq. 3).

    Args:
        config: Which layers it sees, raw or normalised, and its dropout.
        num_layers: Weights per token.
        dim: Channels of one layer.
        last_weight: Start value of the last layer's weight; the others start near 0.
    """

    def __init__(
        self, config: FusionConfig, num_layers: int, dim: int, last_weight: float = 1.0
    ) -> None:
        super().__init__()
        self.config = config
        self.last_weight = last_weight
        seen = num_layers * dim if config.router_scope == "all" else dim
        self.linear = Linear(seen, num_layers)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start on the last layer, with small noise so that no two layers are tied."""
        self.linear.weight.normal_(std=ROUTER_INIT_STD / math.sqrt(self.linear.in_features))
        self.linear.bias.zero_()
        self.linear.bias[-1] = self.last_weight

    def forward(
        self,
        hidden: Float[Tensor, "batch layers tokens dim"],
        features: Float[Tensor, "batch layers tokens dim"],
    ) -> Float[Tensor, "batch tokens layers"]:
        """Raw weights, any sign and size.

        Args:
            hidden: Raw block outputs.
            features: The same, normalised.
        """
        raw = self.linear(router_view(self.config, hidden, features))
        return F.dropout(raw, self.config.router_dropout, self.training)


def router_view(
    config: FusionConfig,
    hidden: Float[Tensor, "batch layers tokens dim"],
    features: Float[Tensor, "batch layers tokens dim"],
) -> Float[Tensor, "batch tokens seen"]:
    """What a router sees of each token: all layers concatenated, or the deepest alone."""
    seen = hidden if config.router_input == "raw" else features
    if config.router_scope == "deepest":
        return seen[:, -1]
    return seen.transpose(1, 2).flatten(2)  # [B, L, N, C] -> [B, N, L * C]


class LayerAttention(nn.Module):
    """Cross-attention over depth: z_base asks, the experts' outputs answer (Table 3, first row).

    The paper names this baseline without a formula. Here: one head per token, keys of full width, a
    learned bias per layer that starts on the last one, and values taken as they are, so that only
    the weighting differs from Eq. 4.

    Args:
        num_layers: Layers attended to.
        dim: Channels.
    """

    def __init__(self, num_layers: int, dim: int) -> None:
        super().__init__()
        self.query = Linear(dim, dim)
        self.key = Linear(dim, dim)
        self.layer_bias = nn.Parameter(torch.zeros(num_layers))
        with torch.no_grad():
            self.query.weight.normal_(std=ROUTER_INIT_STD)
            self.key.weight.normal_(std=ROUTER_INIT_STD)
            self.layer_bias[-1] = SOFTMAX_LAST_LOGIT

    def forward(
        self,
        base: Float[Tensor, "batch tokens dim"],
        experts: Float[Tensor, "batch layers tokens dim"],
    ) -> Float[Tensor, "batch tokens layers"]:
        """Attention weight of each layer, positive, summing to 1."""
        scores = torch.einsum("bnc,blnc->bnl", self.query(base), self.key(experts))
        return torch.softmax(scores / math.sqrt(base.shape[-1]) + self.layer_bias, dim=-1)


def depth_groups(num_layers: int, num_groups: int) -> list[slice]:
    """Split layers into contiguous groups from shallow to deep, as equal as possible.

    Raises:
        ValueError: If there are fewer layers than groups.
    """
    if num_layers < num_groups:
        raise ValueError(
            f"{num_groups} depth groups need at least {num_groups} layers, got {num_layers}: "
            "give fewer entries per group or read more layers."
        )
    bounds = [round(i * num_layers / num_groups) for i in range(num_groups + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def routing_penalty(
    config: FusionConfig, weights: Float[Tensor, "batch tokens layers"]
) -> Float[Tensor, ""]:
    """Spatial smoothness of the routing: mean squared difference of neighbouring tokens' weights.

    Rows and columns together, times `config.routing_smoothness`; 0 when that is 0. HiRAE names the
    penalty without a formula.
    """
    if config.routing_smoothness == 0.0:
        return weights.new_zeros(())
    grid = grid_side(weights.shape[1])
    if grid == 1:
        return weights.new_zeros(())
    layout = weights.unflatten(1, (grid, grid))
    down = (layout[:, 1:] - layout[:, :-1]).square().flatten()
    right = (layout[:, :, 1:] - layout[:, :, :-1]).square().flatten()
    return config.routing_smoothness * torch.cat([down, right]).mean()
