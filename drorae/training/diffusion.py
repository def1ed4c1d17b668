"""The diffusion loop: DiT-DH regresses the velocity noise - clean on normalised latents.

Its output is that velocity, or the clean latents from which the velocity follows (RAEv2); the loss
is the squared error of the velocity either way. A base head takes the same loss.

The guide uses the same loop. t = 0 is clean and t = 1 is noise. The draws of time, noise and
dropped labels are functions of (seed, step, position in the global batch), so that neither a resume
nor the number of workers changes them. They are made on the device, where the stored float16
latents are normalised too; between two log points nothing waits for the device. The configuration,
`DiffusionStage`, is in `drorae.training.jobs`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from drorae.diffusion.interpolation import add_noise, velocity_loss
from drorae.diffusion.noise import noise, uniform
from drorae.diffusion.predictions import to_velocity
from drorae.diffusion.times import training_times
from drorae.models.autoencoder import normalise_latent
from drorae.models.dit import DiT
from drorae.shapes import Float, Int
from drorae.training.intervals import log_step, mean_terms, save_if_due
from drorae.training.jobs import DiffusionStage
from drorae.training.loop import LoopTools, TrainReport
from drorae.training.parallel import distribute
from drorae.training.state import apply_update, begin, finish
from drorae.training.world import autocast, part_slices

__all__ = ["DiffusionBatch", "draw_step", "loss_terms", "train_diffusion"]

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
    def ids_digest(self) -> int:
        """Checksum of the ids of the whole global batch, 32 bits."""
        ...

    @property
    def latents(self) -> Float[Tensor, "batch channels height width"]:
        """Clean latents as they are stored: float16, not normalised, on the CPU."""
        ...

    @property
    def labels(self) -> Int[Tensor, " batch"]:
        """Class of each image."""
        ...


class Part(NamedTuple):
    """What is worked through at once, on the device."""

    clean: Float[Tensor, "batch channels height width"]
    """Normalised latents."""
    t: Float[Tensor, " batch"]
    """One time per latent."""
    noise: Float[Tensor, "batch channels height width"]
    """Standard normal draw."""
    labels: Int[Tensor, " batch"]
    """Classes, some replaced by the null class."""


def draw_step(
    job: DiffusionStage, batch: DiffusionBatch, seed: int, stats: Mapping[str, Tensor]
) -> Part:
    """One rank's part of a step on the device of the statistics: latents, times, noise, labels.

    Every draw is a function of (seed, step * batch_images + position).

    Args:
        job: Law of the times, share of dropped labels.
        batch: This rank's part of the global batch.
        seed: Seed of the run.
        stats: `mean` and `var` of the latents, as the stage `latents` measured them.
    """
    device = stats["mean"].device
    latents = batch.latents.to(device, non_blocking=True).float()
    labels = batch.labels.to(device, non_blocking=True)
    ids, shape = batch.step * job.batch_images + batch.positions, latents.shape[1:]
    for_time, for_label = uniform(seed, STEP_STREAM, ids, (2,), device).unbind(1)
    dropped = for_label < job.model.class_dropout_prob
    return Part(
        normalise_latent(latents, stats["mean"], stats["var"]),
        training_times(for_time, job.times, shape.numel()),
        noise(seed, NOISE_STREAM, ids, shape, device),
        labels.masked_fill(dropped, job.model.num_classes),
    )


def loss_terms(
    job: DiffusionStage,
    output: Tensor | tuple[Tensor, Tensor],
    clean: Float[Tensor, "batch channels height width"],
    noise: Float[Tensor, "batch channels height width"],
    t: Float[Tensor, " batch"],
) -> dict[str, Tensor]:
    """`loss`, and with a base head its parts: loss = loss_full + base_weight * loss_base.

    Args:
        job: Meaning of the output, and the weight of the base head.
        output: Prediction at `add_noise(clean, noise, t)`, or both of a network with a base head.
        clean: The latents that were mixed.
        noise: The noise that was mixed in.
        t: One time per sample.
    """
    noisy = add_noise(clean, noise, t)
    outputs = output if isinstance(output, tuple) else (output,)
    velocities = [to_velocity(part.float(), noisy, t, job.prediction) for part in outputs]
    losses = [velocity_loss(velocity, clean, noise).mean() for velocity in velocities]
    if len(losses) == 1:
        return {"loss": losses[0]}
    full, base = losses
    return {"loss": full + job.base_weight * base, "loss_full": full, "loss_base": base}


def train_diffusion(
    job: DiffusionStage,
    model: DiT,
    batches: Callable[[int], Iterator[DiffusionBatch]],
    tools: LoopTools,
    *,
    stats: Mapping[str, Tensor],
    stage: str,
    seed: int,
) -> TrainReport:
    """Train to `job.num_steps`, continuing from the last checkpoint if there is one.

    Args:
        job: What to compute.
        model: The network, freshly initialised.
        batches: Gives this rank's batches from a step on.
        tools: Checkpoints, logging, evaluation.
        stats: `mean` and `var` of the latents, [channels, height, width].
        stage: Name for messages, `diffusion` or `guide`.
        seed: Seed of the run.

    Raises:
        RuntimeError: Loss or gradient not finite; raised before the weights change.
    """
    device, compute = tools.world.device, tools.compute
    model.to(device).eval()  # labels are dropped in draw_step, not inside the network
    wrapped = distribute(model, tools.world, compute)
    state = begin(
        stage,
        wrapped,
        tools,
        optim=job.optim,
        num_steps=job.num_steps,
        ema_decay=job.ema_decay,
        seed=seed,
    )
    on_device = {name: value.to(device) for name, value in stats.items()}
    for batch in state.meter.timed(batches(state.step)):
        drawn = draw_step(job, batch, seed, on_device)
        rows: list[dict[str, Tensor]] = []

        def loss_of(part: Part, rows: list[dict[str, Tensor]] = rows) -> Tensor:
            rows.append(_forward(job, wrapped, part))
            return rows[-1]["loss"]

        grad_norm = apply_update(state, _cut(drawn, compute.accumulate_steps), loss_of)
        terms = mean_terms(rows) | {"grad_norm": grad_norm}
        log_step(state, tools, terms, job.batch_images, job, batch.ids_digest)
        save_if_due(state, tools, job)
    return finish(state)


def _cut(whole: Part, num_parts: int) -> list[Part]:
    """Equal parts of this rank's share of a step."""
    slices = part_slices(len(whole.t), num_parts)
    return [Part(*(value[rows] for value in whole)) for rows in slices]


def _forward(job: DiffusionStage, network: nn.Module, part: Part) -> dict[str, Tensor]:
    heads = {"with_base": True} if job.model.base_head_after is not None else {}
    noisy = add_noise(part.clean, part.noise, part.t)
    with autocast(noisy.device, job.precision):
        output = network(noisy, part.t, part.labels, **heads)
    return loss_terms(job, output, part.clean, part.noise, part.t)
