"""The re-statements that the benchmarks measure against compute the same as the product."""

import bench_diffusion
import bench_fusion
import pytest
import torch
from bench_timing import count_flops, require_agreement
from torch import nn

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", bench_fusion.SIZES["tiny"])
def test_the_plain_fusion_equals_ours_in_result_and_gradients(size):
    assert bench_fusion.check(*bench_fusion.build(size, CPU)) < 1e-5


def test_the_plain_diffusion_transformer_equals_ours_in_result_and_gradients():
    built = bench_diffusion.build(bench_diffusion.TINY, 3, CPU)
    assert bench_diffusion.check(*built) < 1e-5


def test_both_samplers_end_at_the_same_latents():
    model, weights, inputs = bench_diffusion.build(bench_diffusion.TINY, 3, CPU)
    ours = bench_diffusion.sample_ours(model, inputs, "float32")
    plain = bench_diffusion.sample_plain(weights, model, inputs, "float32")
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_a_difference_is_refused():
    one = {"x": torch.ones(3)}
    with pytest.raises(RuntimeError, match="do not compute the same"):
        require_agreement(one, {"x": 1.01 * torch.ones(3)}, 1e-3)
    with pytest.raises(RuntimeError, match="Different tensors"):
        require_agreement(one, {"y": torch.ones(3)}, 1e-3)


def test_flops_of_a_linear_layer_are_counted():
    # forward and the weight's gradient; the input needs none: 2 * 2 * rows * in * out
    assert count_flops(nn.Linear(8, 16), lambda: (torch.empty(4, 8),)) == 2 * 2 * 4 * 8 * 16
