"""Norms of several layers against autograd's, in float64."""

import pytest
import torch
import torch.nn.functional as F

from drorae.models.stacked_norm import (
    normalise,
    normalise_backward,
    rescaled,
    stacked_norm,
    stacked_norm_backward,
)

EPS = 1e-3


def stack(layers):
    torch.manual_seed(0)
    states = 3 + 2 * torch.randn(layers, 7, 5, dtype=torch.float64)
    weight, bias = torch.randn(2, layers, 1, 5, dtype=torch.float64).unbind(0)
    return states, weight, bias


@pytest.mark.parametrize("layers", [1, 3])
def test_results_and_gradients_are_those_of_layer_norm(layers):
    given = tuple(tensor.requires_grad_() for tensor in stack(layers))
    expected = torch.stack(
        [F.layer_norm(x, (5,), w[0], b[0], EPS) for x, w, b in zip(*given, strict=True)]
    )
    arriving = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, given, arriving)

    states, weight, bias = (tensor.detach() for tensor in given)
    result, kept = stacked_norm(states, weight, bias, EPS)
    torch.testing.assert_close(result, expected.detach())
    torch.testing.assert_close(rescaled(kept, weight, bias, EPS), result)
    into = {"to_weight": torch.empty_like(weight), "to_bias": torch.empty_like(bias)}
    to_states = stacked_norm_backward(arriving.clone(), kept, weight, bias, **into)
    torch.testing.assert_close((to_states, *into.values()), grads)


def test_the_gradient_of_a_plain_norm_needs_only_its_result():
    states = stack(2)[0].requires_grad_()
    expected = F.layer_norm(states, (5,), eps=EPS)
    arriving = torch.randn_like(expected)
    (to_states,) = torch.autograd.grad(expected, states, arriving)
    normed, rstd = normalise(states.detach(), EPS)
    torch.testing.assert_close(normalise_backward(arriving, normed, rstd), to_states)
