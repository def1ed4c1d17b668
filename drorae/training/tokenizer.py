"""One loop for the three tokenizer phases.

They differ only in `TokenizerPhase`: what is trained and how an image is reconstructed.
`decoder_phase` trains the decoder with the fusion frozen (stages `decoder`, `finetune`, `control`),
`fusion_phase` the fusion with the decoder frozen (arXiv 2605.10780, section 3). The loop knows
neither Ray nor MLflow; it takes batches, and everything random in step s is a function of (seed, s,
position in the global batch), so that a resumed run and a run on other numbers of workers see the
same noise. The configuration, `TokenizerTraining`, is in `drorae.training.jobs`.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from drorae.config import Compute
from drorae.data.hidden_states import to_unit
from drorae.models.decoder import Decoder
from drorae.shapes import Float, Int, UInt8
from drorae.training.critic import Critic
from drorae.training.intervals import evaluate_if_due, log_step, save_if_due
from drorae.training.jobs import TokenizerTraining
from drorae.training.loop import LoopTools, TrainReport
from drorae.training.parallel import distribute, set_recompute
from drorae.training.state import begin, finish
from drorae.training.tokenizer_step import Part, TokenizerPhase, TokenizerStep, noised
from drorae.training.world import World, part_slices

__all__ = [
    "TokenizerBatch",
    "TokenizerPhase",
    "decoder_phase",
    "fusion_phase",
    "noised",
    "train_tokenizer",
]

ONE_WORKER = Compute()


class TokenizerBatch(Protocol):
    """One rank's part of a global batch; `drorae.data.loaders` makes them."""

    @property
    def step(self) -> int:
        """Update that this batch feeds, counted from 0."""
        ...

    @property
    def positions(self) -> Int[Tensor, " batch"]:
        """Place of each image in the global batch; with `step` it fixes the noise."""
        ...

    @property
    def ids_digest(self) -> int:
        """Checksum of the ids of the whole global batch, 32 bits."""
        ...

    @property
    def images(self) -> UInt8[Tensor, "batch 3 height width"]:
        """Targets, on the CPU."""
        ...

    @property
    def hidden(self) -> Float[Tensor, "batch layers tokens dim"] | None:
        """Encoder hidden states, float16 on the CPU, deepest layer last; none: made in the step."""
        ...


def decoder_phase(
    name: str,
    fusion: nn.Module,
    decoder: Decoder,
    world: World,
    compute: Compute = ONE_WORKER,
) -> TokenizerPhase:
    """Train the decoder; the fusion is frozen.

    With the fusion of kind `rae` this is the `decoder` stage (and the control), with a trained
    one it is `finetune`.
    """
    fusion = fusion.to(world.device).eval().requires_grad_(False)
    wrapped = distribute(decoder.to(world.device).train(), world, compute)
    return TokenizerPhase(
        name=name,
        trainable=wrapped,
        encode=torch.no_grad()(fusion),
        decode=wrapped,
        last_layer_gradient=decoder.last_layer_gradient,
    )


def fusion_phase(
    fusion: nn.Module,
    decoder: Decoder,
    world: World,
    compute: Compute = ONE_WORKER,
) -> TokenizerPhase:
    """Train the fusion through the frozen decoder.

    Args:
        fusion: Module to train.
        decoder: The `decoder` stage's result.
        world: Rank and device.
        compute: Sharding, compilation, recomputation.
    """
    decoder = decoder.to(world.device).eval().requires_grad_(False)
    if compute.activation_checkpointing:
        set_recompute(decoder)  # its activations carry the gradient to the fusion
    wrapped = distribute(fusion.to(world.device).train(), world, compute)
    return TokenizerPhase(
        name="fusion",
        trainable=wrapped,
        encode=wrapped,
        decode=decoder,
        last_layer_gradient=decoder.last_layer_gradient,
    )


def train_tokenizer(
    job: TokenizerTraining,
    phase: TokenizerPhase,
    batches: Callable[[int], Iterator[TokenizerBatch]],
    lpips: Callable[[Tensor, Tensor], Tensor] | None,
    tools: LoopTools,
    *,
    seed: int,
    critic: Critic | None = None,
    see: Callable[[Tensor], Tensor] | None = None,
) -> TrainReport:
    """Train one phase to `job.num_steps`, continuing from the last checkpoint if there is one.

    Args:
        job: What to compute.
        phase: What is trained and how.
        batches: Gives this rank's batches from a step on.
        lpips: LPIPS of (reconstruction, image) per image, in [0,1]; None leaves the term out.
        tools: Checkpoints, logging, evaluation.
        seed: Seed of the run.
        critic: Discriminator with its optimiser; None trains without the adversarial term.
        see: Frozen encoder, images in [0, 1] on the device to hidden states; needed where batches
            bring none.

    Raises:
        RuntimeError: Loss or gradient not finite; raised before the weights change.
    """
    device, compute = tools.world.device, tools.compute
    state = begin(
        phase.name,
        phase.trainable,
        tools,
        optim=job.optim,
        num_steps=job.num_steps,
        ema_decay=job.ema_decay,
        seed=seed,
        extra=critic,
    )
    work = TokenizerStep(job=job, phase=phase, lpips=lpips, critic=critic, seed=seed)
    for batch in state.meter.timed(batches(state.step)):
        parts = _parts(batch, compute.accumulate_steps, device, see)
        terms = work.run(state, parts)
        log_step(state, tools, terms, job.batch_images, job, batch.ids_digest)
        evaluate_if_due(state, tools, job.eval_every_steps)
        save_if_due(state, tools, job)
    return finish(state)


def _parts(
    batch: TokenizerBatch,
    num_parts: int,
    device: torch.device,
    see: Callable[[Tensor], Tensor] | None,
) -> list[Part]:
    """Equal parts of this rank's batch on the device, with its hidden states or computed ones."""
    parts = []
    for index, rows in enumerate(part_slices(len(batch.positions), num_parts)):
        images = to_unit(batch.images[rows].to(device, non_blocking=True))
        if batch.hidden is None:
            hidden = _seen(images, see)
        else:
            hidden = batch.hidden[rows].to(device, non_blocking=True).float()
        parts.append(Part(index, batch.positions[rows], images, hidden))
    return parts


def _seen(images: Tensor, see: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Hidden states in float32, outside of any autocast."""
    assert see is not None, "batches without hidden states need an encoder"
    with torch.no_grad():
        return see(images)
