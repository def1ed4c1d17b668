"""LayerNorm of a stack of layers, each with its own scale and shift, forward and backward.

PyTorch's operator knows one scale for all rows. One layer alone is handed to it whole, which saves
passes over memory (measured 2026-11-24, 1536 rows on two cores: 1.04x for the fusion's whole step);
several are normalised together and scaled after. Nothing here is differentiable:
`drorae.models.expert_mixture` is, by hand.
"""

from typing import NamedTuple

import torch

from drorae.shapes import Float, Tensor

__all__ = [
    "NormInput",
    "normalise",
    "normalise_backward",
    "rescaled",
    "stacked_norm",
    "stacked_norm_backward",
]

INPUT_ALONE = [True, False, False]  # which gradients PyTorch's operator is to compute


class NormInput(NamedTuple):
    """What the backward pass needs of a `stacked_norm`."""

    states: Float[Tensor, "layers rows dim"]
    """Of one layer as given, of several normalised, because each form spares its side a pass."""
    mean: Float[Tensor, "layers rows 1"]
    """Of what was given."""
    rstd: Float[Tensor, "layers rows 1"]
    """1 / deviation of what was given."""


def normalise(
    states: Float[Tensor, "*rows dim"], eps: float
) -> tuple[Float[Tensor, "*rows dim"], Float[Tensor, "*rows 1"]]:
    """States of mean 0 and variance 1 per row, and 1 / deviation of what was given."""
    normed, _, rstd = torch.native_layer_norm(states, states.shape[-1:], None, None, eps)
    return normed, rstd


def normalise_backward(
    grad: Float[Tensor, "*rows dim"],
    normed: Float[Tensor, "*rows dim"],
    rstd: Float[Tensor, "*rows 1"],
) -> Float[Tensor, "*rows dim"]:
    """Gradient before `normalise` from its results: rstd (g - mean(g) - n mean(g n))."""
    mean, deviation = torch.zeros_like(rstd), torch.ones_like(rstd)  # of the result
    grad_input, _, _ = torch.ops.aten.native_layer_norm_backward(
        grad, normed, normed.shape[-1:], mean, deviation, None, None, INPUT_ALONE
    )
    return grad_input.mul_(rstd)


def stacked_norm(
    states: Float[Tensor, "layers rows dim"],
    weight: Float[Tensor, "layers 1 dim"],
    bias: Float[Tensor, "layers 1 dim"],
    eps: float,
) -> tuple[Float[Tensor, "layers rows dim"], NormInput]:
    """LayerNorm of every layer, and what its backward pass needs."""
    shape = states.shape[-1:]
    if len(states) == 1:
        affine = weight[0, 0], bias[0, 0]
        result, mean, rstd = torch.native_layer_norm(states, shape, *affine, eps)
        return result, NormInput(states, mean, rstd)
    normed, mean, rstd = torch.native_layer_norm(states, shape, None, None, eps)
    return torch.addcmul(bias, normed, weight), NormInput(normed, mean, rstd)


def rescaled(
    kept: NormInput,
    weight: Float[Tensor, "layers 1 dim"],
    bias: Float[Tensor, "layers 1 dim"],
    eps: float,
) -> Float[Tensor, "layers rows dim"]:
    """The result of `stacked_norm` once more."""
    if len(kept.states) == 1:
        return stacked_norm(kept.states, weight, bias, eps)[0]
    return torch.addcmul(bias, kept.states, weight)


def stacked_norm_backward(
    grad: Float[Tensor, "layers rows dim"],
    kept: NormInput,
    weight: Float[Tensor, "layers 1 dim"],
    bias: Float[Tensor, "layers 1 dim"],
    *,
    to_weight: Float[Tensor, "layers 1 dim"],
    to_bias: Float[Tensor, "layers 1 dim"],
) -> Float[Tensor, "layers rows dim"]:
    """Gradient before `stacked_norm`; `to_weight` and `to_bias` are filled.

    Args:
        grad: At the result; overwritten.
        kept: From the forward pass.
        weight: Scales.
        bias: Shifts.
        to_weight: Where the gradient of the scales goes.
        to_bias: Where that of the shifts goes.
    """
    if len(kept.states) == 1:
        to_states, own_weight, own_bias = torch.ops.aten.native_layer_norm_backward(
            grad, kept.states, grad.shape[-1:], kept.mean, kept.rstd, weight[0, 0], bias[0, 0],
            [True, True, True],
        )  # fmt: skip
        to_weight.copy_(own_weight)
        to_bias.copy_(own_bias)
        return to_states
    torch.sum(grad, 1, keepdim=True, out=to_bias)
    torch.sum(grad * kept.states, 1, keepdim=True, out=to_weight)
    return normalise_backward(grad.mul_(weight), kept.states, kept.rstd)
