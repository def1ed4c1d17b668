"""The diffusion loop: DiT-DH regresses the velocity noise - clean on normalised latents; the guide uses the same loop.

t = 0 is clean and t = 1 is noise. The draws of time, noise and dropped labels are functions of (seed, step, position in
the global batch), so that neither a resume nor the number of workers changes them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from drorae.diffusion.interpolation import add_noise, velocity_loss
from drorae.diffusion.noise import sample_generator, sample_noise
from drorae.diffusion.times import TimeConfig, sample_times
from drorae.models.dit import DiT, DiTConfig
from drorae.shapes import Float, Int
from drorae.training.loop import LoopTools, TrainReport
from drorae.training.optim import OptimConfig
from drorae.training.state import apply_update, begin, log_step, save_if_due
from drorae.training.world import wrap_ddp

__all__ = ["DiffusionBatch", "DiffusionStage", "train_diffusion"]

NOISE_STREAM = "diffusion/noise"  # separate the draws of noise from those of times and labels
STEP_STREAM = "diffusion/step"


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionStage:
    """What the `diffusion` and `guide` stages compute."""

    model: DiTConfig
    """The network."""
    num_steps: int
    """Optimiser steps. DRoRAE: 80 epochs at batch 256 = 400k; RAE: 80 epochs at batch 1024 = 100k."""
    batch_images: int = 256
    """Images in a global batch, over all workers. DRoRAE 256, RAE 1024."""
    times: TimeConfig = field(default_factory=TimeConfig)
    """Distribution of t and its shift."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, schedule="constant", clip_norm=1.0
        )
    )
    """Optimiser. DRoRAE section 2.2: constant 1e-4, (.9,.999), no decay; clipping from RAE."""
    ema_decay: float = 0.9995
    """Decay of the weight average per step. RAE."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Autocast of the forward pass. RAE recommends float32 for this stage."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.num_steps < 1 or self.batch_images < 1:
            raise ValueError(
                f"num_steps={self.num_steps}, batch_images={self.batch_images}: expected 1 or more."
            )
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay={self.ema_decay} is out of range: expected [0, 1).")


class DiffusionBatch(Protocol):
    """One rank's part of a global batch; `drorae.data.loaders` makes them."""

    @property
    def step(self) -> int:
        """Update that this batch feeds, counted from 0."""
        ...

    @property
    def positions(self) -> Int[Tensor, " batch"]:
        """Place of each latent in the global batch."""
        ...

    @property
    def latents(self) -> Float[Tensor, "batch channels height width"]:
        """Normalised clean latents."""
        ...

    @property
    def labels(self) -> Int[Tensor, " batch"]:
        """Class of each image."""
        ...


def draw_step(
    job: DiffusionStage, batch: DiffusionBatch, seed: int
) -> tuple[Float[Tensor, " batch"], Tensor, Int[Tensor, " batch"]]:
    """Times, noise and labels (some replaced by the null class) of one rank's part of a step.

    Times and label drops are drawn for the whole global batch and then indexed, noise per image.
    """
    generator = sample_generator(seed, batch.step, STEP_STREAM)
    shape = batch.latents.shape[1:]
    t = sample_times(job.times, job.batch_images, generator, num_elements=shape.numel())
    drop = torch.rand(job.batch_images, generator=generator) < job.model.class_dropout_prob
    null = torch.full_like(batch.labels, job.model.num_classes)
    labels = torch.where(drop[batch.positions], null, batch.labels)
    indices = batch.step * job.batch_images + batch.positions
    return t[batch.positions], sample_noise(seed, indices, shape, NOISE_STREAM), labels


def train_diffusion(
    job: DiffusionStage,
    model: DiT,
    batches: Callable[[int], Iterator[DiffusionBatch]],
    tools: LoopTools,
    *,
    stage: str,
    seed: int,
) -> TrainReport:
    """Train to `job.num_steps`, continuing from the last checkpoint if there is one.

    Args:
        job: What to compute.
        model: The network, freshly initialised.
        batches: Gives this rank's batches from a step on.
        tools: Checkpoints, logging, evaluation.
        stage: Name for messages, `diffusion` or `guide`.
        seed: Seed of the run.

    Raises:
        RuntimeError: Loss or gradient not finite; raised before the weights change.
    """
    device = tools.world.device
    model.to(device).eval()  # labels are dropped in draw_step, not inside the network
    wrapped = wrap_ddp(model, tools.world)
    state = begin(
        stage,
        model,
        tools,
        optim=job.optim,
        num_steps=job.num_steps,
        ema_decay=job.ema_decay,
    )
    for batch in state.meter.timed(batches(state.step)):
        t, noise, labels = (x.to(device) for x in draw_step(job, batch, seed))
        clean = batch.latents.to(device)
        noisy = add_noise(clean, noise, t)
        with torch.autocast(device.type, torch.bfloat16, enabled=job.precision == "bfloat16"):
            velocity = wrapped(noisy, t, labels)
        loss = velocity_loss(velocity.float(), clean, noise).mean()
        terms = {"loss": loss, "grad_norm": apply_update(state, loss)}
        log_step(state, tools, terms, job.batch_images, job)
        save_if_due(state, tools, job)
    return TrainReport(ema=state.ema, history=state.history)
