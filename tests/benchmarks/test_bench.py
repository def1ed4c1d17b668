"""The re-statements that the benchmarks measure against compute the same as the product."""

import platform
import subprocess
import sys
from pathlib import Path

import bench_diffusion
import bench_fusion
import bench_host
import bench_loop
import pytest
import torch
from bench_timing import count_flops, require_agreement
from torch import nn

from drorae.training.jobs import OptimConfig

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


FAULTS = """
import ctypes, resource, torch
from bench_timing import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(3 << 18) for _ in range(20)]  # 20 x 3 MiB
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for setting in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
    ctypes.CDLL(None).mallopt(setting, 128 << 10)  # what a process starts with
young = [faults() for _ in range(3)][-1]
print(keep_freed_memory(), young, [faults() for _ in range(3)][-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_that_was_freed_costs_no_page_faults_again():
    run = subprocess.run(
        [sys.executable, "-c", FAULTS],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    works, young, settled = run.stdout.split()
    assert works == "True"
    assert int(young) > 10_000
    assert int(settled) < 1_000


def test_the_host_is_timed_apart_from_the_device():
    rows = list(bench_host.rows(CPU, "tiny", 1))
    assert [row["loop"] for row in rows] == ["diffusion", "tokenizer"]
    for row in rows:
        assert row["parameter_tensors"] > 50
        assert row["step_ms"] > 0
        assert row["host_ms"] == row["step_ms"] + row["update_ms"]


def test_loops_and_checkpoints_are_timed():
    rows = list(bench_loop.rows(CPU, "tiny", 1))
    assert [row["loop"] for row in rows] == [
        "diffusion",
        "decoder",
        "decoder, L1 alone",
        "fusion",
        "fusion, L1 alone",
    ]
    for row in rows:
        assert row["stage_over_bare"] > 0
        assert 0 < row["save_blocks_ms"] <= row["save_and_write_ms"]
        assert 0 < row["blocked_share"] < row["share_if_writing_stopped_the_loop"]


def test_the_bare_loop_averages_and_clips():
    layer = nn.Linear(2, 1, bias=False)
    start = layer.weight.detach().clone()
    optim = OptimConfig(lr=0.1, betas=(0.9, 0.999), weight_decay=0.0, clip_norm=1.0)
    step = bench_loop.bare_step(layer, lambda: 100 * layer(torch.ones(1, 2)).sum(), optim, 0.5)
    step()
    # AdamW's first step has the size of the rate, whatever the gradient
    torch.testing.assert_close(layer.weight.detach(), start - 0.1, rtol=0, atol=1e-5)
    assert layer.weight.grad.norm().item() == pytest.approx(1.0, rel=1e-4)
