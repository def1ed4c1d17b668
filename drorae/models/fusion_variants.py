"""The other fusions behind the same interface: RAE, RAEv2, HiRAE and an angle budget.

Sources: RAE arXiv:2510.11690 (`LastLayer`), RAEv2 arXiv:2605.18324 (`MeanOfLayers`), HiRAE
arXiv:2609.37775 (`CappedFusion`, its 24-layer form; its 7-layer form is kind `drorae` on seven
layers). `AngleBudgetFusion` is this project's: it turns the bound that Eq. 5 of arXiv:2605.10780
only implies into the parameter itself.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from drorae.models.experts import Experts, Router, depth_groups, router_view, routing_penalty
from drorae.models.fusion_config import FusionConfig
from drorae.models.fusion_output import FusionOutput
from drorae.models.layers import normalise_features
from drorae.shapes import Float, Tensor

__all__ = ["AngleBudgetFusion", "CappedFusion", "LastLayer", "MeanOfLayers"]

HIRAE_ENERGY_FLOOR = 1e-6  # the epsilon inside HiRAE's max(); the paper gives no value
GATE_START = -4.0  # sigmoid(-4) = 0.018: a budget of 14.48 degrees starts at 0.26
TINY = 1e-20  # keeps the gradient of a square root finite at 0


class LastLayer(nn.Module):
    """RAE: the last block's output after LayerNorm without affine. No parameters.

    Args:
        eps: Epsilon of the backbone's LayerNorm.
    """

    def __init__(self, *, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, hidden: Float[Tensor, "batch layers tokens dim"]) -> FusionOutput:
        """Normalise the last layer; the others may be absent."""
        base = normalise_features(hidden[:, -1], self.eps)
        return FusionOutput(latent=base, base=base, penalty=base.new_zeros(()))


class MeanOfLayers(nn.Module):
    """RAEv2: mean of the k deepest normalised layers. No parameters, no outer LayerNorm.

    RAEv2's paper prints a sum and its code takes the mean; every layer goes through the final
    LayerNorm without affine.

    Args:
        num_layers: k; 1 is RAE.
        add_spatial_mean: Add the deepest layer's mean over tokens, as RAEv2 does for DINOv3.
        eps: Epsilon of the backbone's LayerNorm.
    """

    def __init__(self, num_layers: int, *, add_spatial_mean: bool, eps: float) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.add_spatial_mean = add_spatial_mean
        self.eps = eps

    def forward(self, hidden: Float[Tensor, "batch layers tokens dim"]) -> FusionOutput:
        """Average normalised layers."""
        features = normalise_features(hidden[:, -self.num_layers :], self.eps)
        base = features[:, -1]
        latent = features.mean(dim=1)
        if self.add_spatial_mean:
            latent = latent + base.mean(dim=1, keepdim=True)
        return FusionOutput(latent=latent, base=base, penalty=base.new_zeros(()))


class CappedFusion(nn.Module):
    """HiRAE-24: signed experts in depth groups, each group's residual capped per image.

    w = a / sqrt(max(sum a^2, eps)); R_g = sum of w_l U_l over the group; D_g = dropout(R_g);
    Delta_g = D_g min(1, c_g |H| / |D_g|), norms over all tokens and channels of an image; z = LN(H
    + sum Delta_g). Caps hold in inference too. With other layer counts than 24 the layers are split
    as evenly as possible. The published router sees the deepest layer alone: set
    `router_scope="deepest"`. The start of `drorae.models.experts` replaces the paper's unknown one.

    Args:
        config: Kind `hirae`.
        num_layers: Layers used.
        dim: Channels.
        eps: Epsilon of the backbone's LayerNorm.
        recompute: Recompute expert activations in the backward pass.
    """

    def __init__(
        self,
        config: FusionConfig,
        num_layers: int,
        dim: int,
        *,
        eps: float,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_layers = num_layers
        self.eps = eps
        self.groups = depth_groups(num_layers, len(config.group_caps))
        hidden, activation = config.expert_hidden, config.activation
        self.experts = Experts(num_layers, dim, hidden, activation, eps=eps, recompute=recompute)
        self.router = Router(config, num_layers, dim)

    def forward(self, hidden: Float[Tensor, "batch all_layers tokens dim"]) -> FusionOutput:
        """Fuse raw block outputs, shallow to deep, the last block last."""
        hidden = hidden[:, -self.num_layers :]
        features = normalise_features(hidden, self.eps)
        base = features[:, -1]
        raw = self.router(hidden, features)
        energy = raw.square().sum(dim=-1, keepdim=True)
        weights = raw / torch.sqrt(energy.clamp_min(HIRAE_ENERGY_FLOOR))
        mixed = self.experts.mixed_in_groups(features, weights, self.groups)
        step = sum(self._residual(g, sums, base) for g, sums in enumerate(mixed))
        return FusionOutput(
            latent=normalise_features(base + step, self.eps),
            base=base,
            weights=weights,
            router_norm=raw.detach().norm(dim=-1).mean(),
            penalty=routing_penalty(self.config, weights),
        )

    def _residual(self, group: int, mixed: Tensor, base: Tensor) -> Tensor:
        dropped = F.dropout(mixed, self.config.group_dropout[group], self.training)
        return cap_per_image(dropped, base, self.config.group_caps[group])


def cap_per_image(
    residual: Float[Tensor, "batch tokens dim"], base: Float[Tensor, "batch tokens dim"], cap: float
) -> Float[Tensor, "batch tokens dim"]:
    """Shrink a residual so that its norm over a whole image is at most `cap` times the base's."""
    size = (residual.square().sum(dim=(1, 2), keepdim=True) + TINY).sqrt()
    limit = cap * base.square().sum(dim=(1, 2), keepdim=True).sqrt()
    return residual * (limit / size).clamp_max(1.0)


class AngleBudgetFusion(nn.Module):
    """Turn z_base on its sphere by a learned angle within a budget.

    Per depth group g: the signed mixture of experts, its part orthogonal to z_base scaled to length
    1 (u_g), and an angle theta_g = budget_g * sigmoid(gate_g). With the tangent T = sum theta_g
    u_g, z = cos|T| z_base + sin|T| |z_base| T / |T|. Mean 0 and norm of z_base are kept, so no
    outer LayerNorm is needed; a budget of 0 is RAE; no scale is left undetermined. DRoRAE at beta
    0.2 can turn a token by 14.48 degrees.

    Args:
        config: Kind `angle_budget`.
        num_layers: Layers used.
        dim: Channels.
        eps: Epsilon of the backbone's LayerNorm.
        recompute: Recompute expert activations in the backward pass.
    """

    budget: Tensor

    def __init__(
        self,
        config: FusionConfig,
        num_layers: int,
        dim: int,
        *,
        eps: float,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_layers = num_layers
        self.eps = eps
        self.groups = depth_groups(num_layers, len(config.angle_budget_deg))
        hidden, activation = config.expert_hidden, config.activation
        self.experts = Experts(num_layers, dim, hidden, activation, eps=eps, recompute=recompute)
        # The expert of the last layer starts along z_base, where no direction to turn is defined:
        # start without it.
        self.router = Router(config, num_layers, dim, last_weight=0.0)
        self.gate = nn.Linear(self.router.linear.in_features, len(self.groups))
        with torch.no_grad():
            self.gate.weight.zero_()
            self.gate.bias.fill_(GATE_START)
        self.register_buffer(
            "budget", torch.tensor([math.radians(a) for a in config.angle_budget_deg]), False
        )

    def forward(self, hidden: Float[Tensor, "batch all_layers tokens dim"]) -> FusionOutput:
        """Fuse raw block outputs, shallow to deep, the last block last."""
        hidden = hidden[:, -self.num_layers :]
        features = normalise_features(hidden, self.eps)
        base = features[:, -1]
        raw = self.router(hidden, features)
        weights = F.normalize(raw, dim=-1, eps=1e-8)
        view = router_view(self.config, hidden, features)
        angles = self.budget * torch.sigmoid(self.gate(view))  # [B, N, groups], radians
        tangent = torch.zeros_like(base)
        mixed = self.experts.mixed_in_groups(features, weights, self.groups)
        for angle, sums in zip(angles.unbind(-1), mixed, strict=True):
            tangent = tangent + angle[..., None] * orthogonal_unit(sums, base)
        return FusionOutput(
            latent=rotate(base, tangent),
            base=base,
            weights=weights,
            router_norm=raw.detach().norm(dim=-1).mean(),
            penalty=routing_penalty(self.config, weights),
        )


def orthogonal_unit(
    vectors: Float[Tensor, "*rest dim"], base: Float[Tensor, "*rest dim"]
) -> Float[Tensor, "*rest dim"]:
    """The part of each vector orthogonal to its base, at length 1; shorter where none is left."""
    along = (vectors * base).sum(-1, keepdim=True) / base.square().sum(-1, keepdim=True)
    across = vectors - along * base
    softening = 1e-8 * base.shape[-1]  # against directions made of rounding errors
    return across / torch.sqrt(across.square().sum(-1, keepdim=True) + softening)


def rotate(
    base: Float[Tensor, "*rest dim"], tangent: Float[Tensor, "*rest dim"]
) -> Float[Tensor, "*rest dim"]:
    """Move along the great circle of `base` towards `tangent`, by its length in radians."""
    angle = torch.sqrt(tangent.square().sum(-1, keepdim=True) + TINY)
    radius = base.norm(dim=-1, keepdim=True)
    return angle.cos() * base + torch.sinc(angle / math.pi) * radius * tangent
