"""Pieces that several networks share: position table, plain LayerNorm, attention, token grids.

What is not here: whole blocks. Each network names its parameters after the checkpoint it must load,
so each defines its own block from these functions.
"""

import math

import torch
import torch.nn.functional as F

from drorae.shapes import Float, Tensor

__all__ = [
    "attend",
    "grid_side",
    "map_to_tokens",
    "normalise_features",
    "sincos_position_table",
    "tokens_to_map",
]


def sincos_position_table(dim: int, grid: int) -> Float[Tensor, "tokens dim"]:
    """Fixed 2-D sin-cos positions of a square grid, row-major.

    The first half of the channels encodes the column, the second half the row; each half is [sin,
    cos] of position * 10000^(-k / (dim / 4)). Computed in float64 and cast once, as RAE's decoder
    and DiT do.

    Args:
        dim: Channels; a multiple of 4.
        grid: Tokens along one side.

    Raises:
        ValueError: If `dim` is not a positive multiple of 4 or `grid` is not positive.
    """
    if dim <= 0 or dim % 4 or grid <= 0:
        raise ValueError(
            f"dim={dim}, grid={grid} give no position table: expected dim a positive multiple of 4 "
            "and grid at least 1; change the width of the model."
        )
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    column = line[None, :, :].expand(grid, grid, dim // 2)
    row = line[:, None, :].expand(grid, grid, dim // 2)
    return torch.cat([column, row], dim=-1).reshape(grid * grid, dim).float()


def normalise_features(
    features: Float[Tensor, "*rest dim"], eps: float
) -> Float[Tensor, "*rest dim"]:
    """LayerNorm without affine over the channels: LN_bb of the paper, RAE's last norm.

    Args:
        features: Any stack of token features.
        eps: The backbone's own LayerNorm epsilon.
    """
    return F.layer_norm(features, (features.shape[-1],), eps=eps)


def attend(
    query: Float[Tensor, "batch tokens dim"],
    key: Float[Tensor, "batch tokens dim"],
    value: Float[Tensor, "batch tokens dim"],
    heads: int,
) -> Float[Tensor, "batch tokens dim"]:
    """Multi-head attention of projected tokens, without mask, through SDPA."""
    # [B, N, D] -> [B, heads, N, D / heads]
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def grid_side(num_tokens: int) -> int:
    """Side of a square token grid.

    Raises:
        ValueError: If the tokens do not fill a square.
    """
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(
            f"num_tokens={num_tokens} is no square number: expected patch tokens of a square grid; "
            "drop class and register tokens first."
        )
    return side


def tokens_to_map(
    tokens: Float[Tensor, "batch tokens dim"],
) -> Float[Tensor, "batch dim side side"]:
    """Row-major tokens as a square feature map."""
    side = grid_side(tokens.shape[1])
    return tokens.transpose(1, 2).unflatten(2, (side, side)).contiguous()


def map_to_tokens(
    latent_map: Float[Tensor, "batch dim height width"],
) -> Float[Tensor, "batch tokens dim"]:
    """Inverse of `tokens_to_map`."""
    return latent_map.flatten(2).transpose(1, 2).contiguous()
