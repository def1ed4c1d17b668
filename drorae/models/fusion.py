"""Depth-routed fusion of all encoder layers into one latent (arXiv:2605.10780, Eq. 1 to 5).

The module reads raw block outputs z(1)..z(L) of patch tokens and writes z_final with the same
tokens and channels. `beta = 0` is RAE to rounding. Peers with the same interface are in
`drorae.models.fusion_variants`; parameters and their start in `drorae.models.experts`.

Where the paper contradicts itself, this is what holds here:

* Size: the abstract says 29M, Tables 8 and 9 say 56.7M for a hidden width of 3072, and the formula
  gives 56.78M without the hidden LayerNorm. Default 3072; `parameter_counts` counts tensors. 1536
  gives the 29M.
* Activation: none in the appendix, GELU in the same authors' follow-up. GELU by default,
  `activation="none"` for the letter.
* Router input: raw z(k) in Eq. 3, normalised in the text. Normalised by default: raw scales differ
  tenfold between layers.
* LN_bb: "the backbone's own" in the text, without affine in RAE's code. Without affine, with the
  backbone's epsilon, because the decoder was trained on such latents and beta = 0 must be RAE.
* "Energy constraint": Eq. 4 divides by a positive number per token and then normalises, so the
  division changes nothing; what differs from softmax is the sign. Kept as printed, with a test of
  the invariance. What bounds the change is Eq. 5: below beta = 0.5 a token turns by asin(beta / (1
  - beta)) at most, 14.48 degrees at 0.2.
* Start: unspecified; see `drorae.models.experts`.
"""

import torch
from torch import nn

from drorae.models.experts import (
    SOFTMAX_LAST_LOGIT,
    Experts,
    LayerAttention,
    Router,
    routing_penalty,
)
from drorae.models.fusion_config import FusionConfig
from drorae.models.fusion_output import FusionOutput, token_angles_deg
from drorae.models.fusion_variants import AngleBudgetFusion, CappedFusion, LastLayer, MeanOfLayers
from drorae.models.layers import normalise_features
from drorae.shapes import Float, Tensor

__all__ = [
    "DepthRoutedFusion",
    "FusionConfig",
    "FusionOutput",
    "build_fusion",
    "parameter_counts",
    "token_angles_deg",
]


class DepthRoutedFusion(nn.Module):
    """The paper's fusion: experts per layer, signed weights per token, a bounded step.

    Args:
        config: Kind `drorae`.
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
        hidden, activation = config.expert_hidden, config.activation
        self.experts = Experts(num_layers, dim, hidden, activation, eps=eps, recompute=recompute)
        if config.aggregation == "cross_attention":
            self.router: nn.Module = LayerAttention(num_layers, dim)
        else:
            last = SOFTMAX_LAST_LOGIT if config.aggregation == "softmax" else 1.0
            self.router = Router(config, num_layers, dim, last)

    def forward(self, hidden: Float[Tensor, "batch all_layers tokens dim"]) -> FusionOutput:
        """Fuse raw block outputs, shallow to deep, the last block last."""
        hidden = hidden[:, -self.num_layers :]
        features = normalise_features(hidden, self.eps)  # LN_bb(z(k))
        base = features[:, -1]  # Eq. 1
        if self.config.aggregation == "cross_attention":
            experts = self.experts(features)  # Eq. 2
            weights, router_norm = self.router(base, experts), None
            mixed = torch.einsum("bnl,blnc->bnc", weights, experts)
        else:
            weights, router_norm = self._route(hidden, features)  # Eq. 3
            mixed = self.experts.mixed(features, weights)  # Eq. 2 and the sum of Eq. 4
        fused = normalise_features(mixed, self.eps)  # Eq. 4
        latent = fused
        if self.config.incremental:
            latent = normalise_features(base + self.config.beta * (fused - base), self.eps)  # Eq. 5
        return FusionOutput(
            latent=latent,
            base=base,
            fused=fused,
            weights=weights,
            router_norm=router_norm,
            penalty=routing_penalty(self.config, weights),
        )

    def _route(self, hidden: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        raw = self.router(hidden, features)
        norm = raw.detach().norm(dim=-1).mean()
        if self.config.aggregation == "softmax":
            return torch.softmax(raw, dim=-1), norm
        energy = raw.square().sum(dim=-1, keepdim=True)
        return raw / torch.sqrt(energy + self.config.energy_eps), norm


def build_fusion(
    config: FusionConfig,
    num_layers: int,
    dim: int,
    *,
    layer_norm_eps: float = 1e-6,
    recompute: bool = False,
) -> nn.Module:
    """Build the fusion that a configuration names; all kinds map hidden states to a `FusionOutput`.

    Args:
        config: Kind and sizes.
        num_layers: Layers that the encoder gives.
        dim: Channels of a token.
        layer_norm_eps: The backbone's (`Encoder.layer_norm_eps`); 1e-6 is DINOv2's.
        recompute: Trade time for memory in training; changes no number.

    Raises:
        ValueError: If more layers are asked for than there are.
    """
    used = num_layers if config.deepest_layers is None else config.deepest_layers
    if used > num_layers:
        raise ValueError(
            f"fusion.deepest_layers={used} exceeds the {num_layers} layers that the encoder gives: "
            "lower it or read more layers."
        )
    if config.kind == "rae":
        return LastLayer(eps=layer_norm_eps)
    if config.kind == "mean_last_k":
        return MeanOfLayers(used, add_spatial_mean=config.add_spatial_mean, eps=layer_norm_eps)
    kinds = {"drorae": DepthRoutedFusion, "hirae": CappedFusion, "angle_budget": AngleBudgetFusion}
    return kinds[config.kind](config, used, dim, eps=layer_norm_eps, recompute=recompute)


def parameter_counts(fusion: nn.Module) -> dict[str, int]:
    """Parameters by tensor: `experts` without their norm, `hidden_norm`, `router`, `total`."""
    counts = {"experts": 0, "hidden_norm": 0, "router": 0}
    for name, parameter in fusion.named_parameters():
        part = "hidden_norm" if "norm_" in name else name.split(".")[0]
        counts["router" if part not in counts else part] += parameter.numel()
    return {**counts, "total": sum(counts.values())}
