"""Result of a fusion, shared by every kind, and the angle by which a fusion turns a token."""

from dataclasses import dataclass

import torch

from drorae.shapes import Float, Tensor

__all__ = ["FusionOutput", "token_angles_deg"]


@dataclass(kw_only=True, slots=True)
class FusionOutput:
    """One latent and what led to it."""

    latent: Float[Tensor, "batch tokens dim"]
    """z_final: what the decoder reads and the diffusion model learns."""
    base: Float[Tensor, "batch tokens dim"]
    """z_base: RAE's latent of the same images."""
    fused: Float[Tensor, "batch tokens dim"] | None = None
    """z_fuse of Eq. 4, where the kind has one."""
    weights: Float[Tensor, "batch tokens layers"] | None = None
    """Weight of each layer per token, after normalisation; signed where the kind allows it."""
    router_norm: Float[Tensor, ""] | None = None
    """Mean l2 norm of the raw router output. Eq. 4 ignores it, so it can drift: log it."""
    penalty: Float[Tensor, ""]
    """Term to add to the training loss, already weighted; 0 where none is configured."""


def token_angles_deg(
    first: Float[Tensor, "*rest dim"], second: Float[Tensor, "*rest dim"]
) -> Float[Tensor, "*rest"]:
    """Angle between two token vectors in degrees, accurate for small angles too.

    From the half-angle form 2 atan2(|a - b|, |a + b|) of unit vectors, in float64; acos loses all
    digits below 0.03 degrees.
    """
    a, b = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (first, second))
    return torch.rad2deg(2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)))
