"""Configuration of a fusion, shared by every kind; without torch.

See `drorae.models.fusion` for the paper's equations and for how each contradiction in the paper is
settled, and `drorae.models.fusion_output` for the result.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = ["UNTRAINED_KINDS", "FusionConfig", "blocks_read"]

UNTRAINED_KINDS = ("rae", "mean_last_k")
"""Kinds without parameters: there is nothing to train or to store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionConfig:
    """How the encoder's layers become one latent. Defaults: arXiv:2605.10780."""

    kind: Literal["rae", "mean_last_k", "drorae", "hirae", "angle_budget"] = "drorae"
    """rae: last layer; mean_last_k: RAEv2; drorae: the paper; hirae: capped depth groups;
    angle_budget: rotation of z_base by a learned, bounded angle."""
    deepest_layers: int | None = None
    """Use only the deepest n of the layers given; none: all. Table 9; the k of mean_last_k."""
    expert_hidden: int = 3072
    """Width of an expert's hidden layer. Table 8: 3072 (56.8M); 1536 is the 29M that the
    abstract names."""
    activation: Literal["gelu", "none"] = "gelu"
    """After the hidden LayerNorm. The paper's list has none; the same authors' follow-up says
    GELU."""
    router_input: Literal["normalised", "raw"] = "normalised"
    """Features that the router sees. Eq. 3 prints raw z(k); the text says that all inputs are
    normalised."""
    router_scope: Literal["all", "deepest"] = "all"
    """Layers that the router sees: all, concatenated (Eq. 3), or the deepest only (HiRAE-24)."""
    aggregation: Literal["energy", "softmax", "cross_attention"] = "energy"
    """How experts are weighted: signed unit-norm weights (Eq. 4) or the two alternatives of
    Table 3."""
    incremental: bool = True
    """Eq. 5 around z_base; off: z_final = z_fuse (Table 3, without beta)."""
    beta: float = 0.2
    """Share of z_fuse in Eq. 5; 0 is RAE. Below 0.5 a token turns by asin(beta / (1 - beta)) at
    most."""
    energy_eps: float = 1e-6
    """Added under the root of Eq. 4. The paper gives no value."""
    router_dropout: float = 0.0
    """Probability of dropping a layer's weight for a token while training. Implied by HiRAE's
    comparator."""
    routing_smoothness: float = 0.0
    """Weight of the spatial smoothness penalty on the weights. HiRAE's DRoRAE comparator: 0.1."""
    group_caps: tuple[float, ...] = (0.025, 0.075, 0.15)
    """hirae: largest residual of each depth group as a share of the base's norm, shallow to
    deep."""
    group_dropout: tuple[float, ...] = (0.5, 0.25, 0.1)
    """hirae: element-wise dropout of each depth group's residual while training."""
    angle_budget_deg: tuple[float, ...] = (14.4775,)
    """angle_budget: largest rotation of a token by each depth group, in degrees. asin(.2 / .8),
    as beta 0.2."""
    add_spatial_mean: bool = False
    """mean_last_k: add the spatial mean of the deepest layer to every token. RAEv2 does so for
    DINOv3."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _check_range("beta", self.beta, 0.0, 1.0)
        _check_range("router_dropout", self.router_dropout, 0.0, 0.99)
        for name in ("group_caps", "group_dropout"):
            for value in getattr(self, name):
                _check_range(name, value, 0.0, 0.99)
        for value in self.angle_budget_deg:
            _check_range("angle_budget_deg", value, 0.0, 90.0)
        if self.expert_hidden < 2:
            raise ValueError(f"fusion.expert_hidden={self.expert_hidden}: expected at least 2.")
        if self.deepest_layers is not None and self.deepest_layers < 1:
            raise ValueError(f"fusion.deepest_layers={self.deepest_layers}: expected at least 1.")
        if len(self.group_caps) != len(self.group_dropout) or not self.group_caps:
            raise ValueError(
                f"fusion.group_caps has {len(self.group_caps)} entries and fusion.group_dropout "
                f"{len(self.group_dropout)}: expected one of each per depth group."
            )
        if not self.angle_budget_deg:
            raise ValueError(
                "fusion.angle_budget_deg is empty: expected one angle per depth group."
            )
        signed_only = self.kind in ("hirae", "angle_budget")
        if signed_only and self.aggregation != "energy":
            raise ValueError(
                f"fusion.aggregation={self.aggregation} has no meaning for "
                f"fusion.kind={self.kind}: use energy."
            )


def blocks_read(config: FusionConfig, block_numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Those of an encoder's blocks that a fusion looks at: its other outputs need not be kept."""
    count = 1 if config.kind == "rae" else config.deepest_layers
    return block_numbers if count is None else block_numbers[-count:]


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"fusion.{name}={value} is out of range: expected {low} to {high}.")
