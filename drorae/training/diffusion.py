"""The diffusion loop: DiT-DH regresses the velocity noise - clean on normalised latents.

The guide uses the same loop. t = 0 is clean and t = 1 is noise. The draws of time, noise and
dropped labels are functions of (seed, step, position in the global batch), so that neither a resume
nor the number of workers changes them. The configuration, `DiffusionStage`, is in
`drorae.training.jobs`.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from drorae.diffusion.interpolation import add_noise, velocity_loss
from drorae.diffusion.noise import sample_generator, sample_noise
from drorae.diffusion.times import sample_times
from drorae.models.dit import DiT
from drorae.shapes import Float, Int
from drorae.training.jobs import DiffusionStage
from drorae.training.loop import LoopTools, TrainReport
from drorae.training.state import apply_update, begin, log_step, save_if_due
from drorae.training.world import wrap_ddp

__all__ = ["DiffusionBatch", "draw_step", "train_diffusion"]

NOISE_STREAM = "diffusion/noise"  # separate the draws of noise from those of times and labels
STEP_STREAM = "diffusion/step"


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
