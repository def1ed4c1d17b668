"""The real loops on CUDA: tokenizer with adversarial term, diffusion, and sampling."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loop_fakes import STATS, Rows
from test_diffusion import JOB as DIFFUSION_JOB
from test_diffusion import make_model
from test_tokenizer import JOB, JUDGE, make_decoder, make_fusion

from drorae.diffusion.guidance import cfg_velocity_fn
from drorae.diffusion.solvers import euler
from drorae.diffusion.times import time_grid
from drorae.models.discriminator import build_discriminator
from drorae.training.critic import Critic
from drorae.training.diffusion import train_diffusion
from drorae.training.jobs import AdversarialConfig
from drorae.training.tokenizer import TokenizerPhase, decoder_phase, fusion_phase, train_tokenizer
from drorae.training.world import World

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
CLOSE = {"rel": 1e-3}  # six steps; the devices sum in other orders


def phase_on(name: str, world: World) -> TokenizerPhase:
    if name == "fusion":
        return fusion_phase(make_fusion(), make_decoder(), world)
    return decoder_phase(name, make_fusion("rae"), make_decoder(), world)


def run_tokenizer(name: str, job: Any, device: torch.device, batches: Any, tools: Any) -> Rows:
    world, log = World(device=device), Rows()
    torch.manual_seed(5)
    judge = build_discriminator(JUDGE)
    critic = Critic(judge, job.adversarial, num_steps=job.num_steps, world=world, seed=0)
    tools = dataclasses.replace(tools, world=world, log=log)
    phase = phase_on(name, world)
    train_tokenizer(job, phase, batches, None, tools, seed=0, critic=critic)
    assert all(p.device.type == device.type for p in phase.trainable.parameters())
    return log


@pytest.mark.parametrize("name", ["decoder", "fusion"])
def test_the_tokenizer_loop_with_gan_follows_the_cpu(
    name: str, tokenizer_batches: Callable, make_tools: Callable
) -> None:
    adversarial = AdversarialConfig(weight=0.5, discriminator=JUDGE)
    job = dataclasses.replace(JOB, adversarial=adversarial, num_steps=3, eval_every_steps=100)
    logs = [
        run_tokenizer(name, job, device, tokenizer_batches(3, 4), make_tools())
        for device in (torch.device("cpu"), DEVICE)
    ]
    exact, rough = (log.series("train/l1") for log in logs)
    assert rough == {step: pytest.approx(value, **CLOSE) for step, value in exact.items()}
    assert logs[1].series("train/gan_weight")[1] > 0


@pytest.mark.parametrize("name", ["decoder", "fusion"])
def test_the_tokenizer_loop_runs_in_bfloat16(
    name: str, tokenizer_batches: Callable, make_tools: Callable
) -> None:
    adversarial = AdversarialConfig(weight=0.5, discriminator=JUDGE)
    job = dataclasses.replace(
        JOB, adversarial=adversarial, num_steps=20, precision="bfloat16", noise_tau=0.0
    )
    log = run_tokenizer(name, job, DEVICE, tokenizer_batches(20, 4), make_tools())
    losses = list(log.series("train/l1").values())
    assert sum(losses[-6:]) < sum(losses[:6])


def run_diffusion(device: torch.device, precision: Any, batches: Any, tools: Any) -> Rows:
    log, model = Rows(), make_model()
    job = dataclasses.replace(DIFFUSION_JOB, precision=precision)
    tools = dataclasses.replace(tools, world=World(device=device), log=log)
    train_diffusion(job, model, batches, tools, stats=STATS, stage="diffusion", seed=0)
    return log


def test_the_diffusion_loop_follows_the_cpu(latent_batches: Callable, make_tools: Callable) -> None:
    exact, rough = (
        run_diffusion(device, "float32", latent_batches(6, 6), make_tools()).series("train/loss")
        for device in (torch.device("cpu"), DEVICE)
    )
    assert rough == {step: pytest.approx(value, **CLOSE) for step, value in exact.items()}


def test_the_diffusion_loop_in_bfloat16_stays_near_float32(
    latent_batches: Callable, make_tools: Callable
) -> None:
    exact, rough = (
        run_diffusion(DEVICE, precision, latent_batches(6, 6), make_tools()).series("train/loss")
        for precision in ("float32", "bfloat16")
    )
    assert rough == {step: pytest.approx(value, rel=0.05) for step, value in exact.items()}


def test_guided_sampling_on_cuda_agrees_with_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    noise, labels = torch.randn(3, 8, 2, 2, generator=generator), torch.arange(3)
    samples = []
    for device in (torch.device("cpu"), DEVICE):
        model = make_model().to(device).eval()
        for parameter in model.parameters():  # a fresh model is zero
            if parameter.requires_grad:
                draw = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                parameter.data.copy_(0.2 * draw)
        velocity = cfg_velocity_fn(model, labels.to(device), null_label=model.null_label, scale=1.5)
        samples.append(euler(velocity, noise.to(device), time_grid(8, 1.0)).cpu())
    torch.testing.assert_close(samples[1], samples[0], rtol=1e-3, atol=1e-3)
