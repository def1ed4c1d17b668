"""One loop for the three tokenizer phases.

They differ only in `TokenizerPhase`: what is trained and how an image is reconstructed.
`decoder_phase` trains the decoder with the fusion frozen (stages `decoder`, `finetune`, `control`),
`fusion_phase` the fusion with the decoder frozen (arXiv 2605.10780, section 3). The loop knows
neither Ray nor MLflow; it takes batches, and everything random in step s is a function of (seed, s,
position in the global batch), so that a resumed run and a run on other numbers of workers see the
same noise. The configuration, `TokenizerTraining`, is in `drorae.training.jobs`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from drorae.diffusion.noise import sample_noise
from drorae.losses.reconstruction import l1_per_image
from drorae.models.autoencoder import add_latent_noise
from drorae.models.decoder import Decoder
from drorae.models.fusion import FusionOutput
from drorae.shapes import Float, Int
from drorae.training.critic import Critic
from drorae.training.ema import averaged
from drorae.training.jobs import TokenizerTraining
from drorae.training.loop import LoopTools, TrainReport
from drorae.training.state import TrainState, apply_update, begin, log_step, save_if_due
from drorae.training.world import World, wrap_ddp

__all__ = [
    "TokenizerBatch",
    "TokenizerPhase",
    "decoder_phase",
    "fusion_phase",
    "noised",
    "train_tokenizer",
]

NOISE_STREAM = "latent/noise"  # separate the draws of latent noise from every other use of the seed
SIGMA_STREAM = "latent/sigma"


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
    def images(self) -> Float[Tensor, "batch 3 height width"]:
        """Targets in [0,1]."""
        ...

    @property
    def hidden(self) -> Float[Tensor, "batch layers tokens dim"] | None:
        """Encoder hidden states of the images, deepest layer last; none: the step computes them."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerPhase:
    """What is trained and how hidden states become an image."""

    name: str
    trainable: nn.Module
    """Module whose parameters are updated (the DDP wrapper when there are several ranks)."""
    encode: Callable[[Tensor], FusionOutput]
    """Hidden states to latent tokens."""
    decode: Callable[[Tensor], Tensor]
    """Latent tokens to images in [0,1] units."""
    last_layer: Tensor
    """Decoder's last weight; the adaptive GAN weight is a ratio of gradients there (Eq. 6)."""


def decoder_phase(name: str, fusion: nn.Module, decoder: Decoder, world: World) -> TokenizerPhase:
    """Train the decoder; the fusion is frozen.

    With the fusion of kind `rae` this is the `decoder` stage (and the control), with a trained
    one it is `finetune`.
    """
    fusion = fusion.to(world.device).eval().requires_grad_(False)
    wrapped = wrap_ddp(decoder.to(world.device).train(), world)
    return TokenizerPhase(
        name=name,
        trainable=wrapped,
        encode=torch.no_grad()(fusion),
        decode=wrapped,
        last_layer=decoder.decoder_pred.weight,
    )


def fusion_phase(
    fusion: nn.Module, decoder: Decoder, world: World, *, adversarial: bool
) -> TokenizerPhase:
    """Train the fusion through the frozen decoder.

    Args:
        fusion: Module to train.
        decoder: The `decoder` stage's result.
        world: Rank and device.
        adversarial: Whether gradients at the decoder's last weight are needed for Eq. 6; the
            weight itself stays frozen, no optimiser holds it.
    """
    decoder = decoder.to(world.device).eval().requires_grad_(False)
    last_layer = decoder.decoder_pred.weight.requires_grad_(adversarial)
    wrapped = wrap_ddp(fusion.to(world.device).train(), world)
    return TokenizerPhase(
        name="fusion", trainable=wrapped, encode=wrapped, decode=decoder, last_layer=last_layer
    )


def noised(
    latent: Float[Tensor, "batch tokens dim"],
    job: TokenizerTraining,
    seed: int,
    indices: Int[Tensor, " batch"],
) -> Float[Tensor, "batch tokens dim"]:
    """Latent plus sigma * N(0, I), one sigma per image, in un-normalised latent space.

    Source: RAE code, section 1.3 of its encoder; `half_normal` is the text's form of sigma.

    Args:
        latent: Clean latent tokens.
        job: Gives `noise_tau` and `noise_kind`.
        seed: Seed of the run.
        indices: One number per image that no other draw of the run uses.
    """
    if job.noise_tau == 0:
        return latent
    draw = sample_noise(seed, indices, (1,), SIGMA_STREAM).abs()
    if job.noise_kind == "uniform":
        draw = torch.erf(draw / 2**0.5)  # |N(0,1)| through its distribution function is U(0,1)
    scale = (job.noise_tau * draw[:, 0]).to(latent)
    noise = sample_noise(seed, indices, latent.shape[1:], NOISE_STREAM).to(latent)
    return add_latent_noise(latent, scale, noise)


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
        see: Frozen encoder, images on the device to hidden states; needed where batches bring none.

    Raises:
        RuntimeError: Loss or gradient not finite; raised before the weights change.
    """
    device = tools.world.device
    state = begin(
        phase.name,
        getattr(phase.trainable, "module", phase.trainable),
        tools,
        optim=job.optim,
        num_steps=job.num_steps,
        ema_decay=job.ema_decay,
        extra=critic,
    )
    for batch in state.meter.timed(batches(state.step)):
        step = batch.step
        images = batch.images.to(device)
        hidden = _hidden_of(batch, images, see)
        with torch.autocast(device.type, torch.bfloat16, enabled=job.precision == "bfloat16"):
            fused = phase.encode(hidden)
            noise_ids = step * job.batch_images + batch.positions
            recon = phase.decode(noised(fused.latent, job, seed, noise_ids))
        recon = recon.float()

        l1 = l1_per_image(recon, images).mean()
        perceptual = lpips(recon, images).mean() if lpips is not None else torch.zeros_like(l1)
        loss = job.l1_weight * l1 + job.lpips_weight * perceptual
        terms = {"loss": loss, "l1": l1, "lpips": perceptual}
        if fused.router_norm is not None:  # Eq. 4 leaves it free, so it can drift
            terms["router_norm"] = fused.router_norm
        if critic is not None and critic.guides(step):
            loss, extra = critic.add_to(loss, recon, phase.last_layer, step)
            terms |= extra

        terms["grad_norm"] = apply_update(state, loss + fused.penalty)
        if critic is not None and critic.learns(step):
            with torch.no_grad():
                fake = phase.decode(phase.encode(hidden).latent).float()
            terms |= critic.update(images, fake, step)

        log_step(state, tools, terms, job.batch_images, job)
        if state.step % job.eval_every_steps == 0 and tools.world.is_main:
            state.history += _evaluate(tools, state)
        save_if_due(state, tools, job)
    return TrainReport(ema=state.ema, history=state.history)


def _hidden_of(
    batch: TokenizerBatch, images: Tensor, see: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Hidden states from the batch, or computed now, in float32 outside of any autocast."""
    if batch.hidden is not None:
        return batch.hidden.to(images.device)
    assert see is not None, "batches without hidden states need an encoder"
    with torch.no_grad():
        return see(images)


def _evaluate(tools: LoopTools, state: TrainState) -> list[dict[str, float]]:
    """Run every evaluator with the averaged weights in place; one row for the history."""
    row: dict[str, float] = {}
    with averaged(state.ema, state.module), torch.no_grad():
        for evaluator in tools.evaluators:
            row |= evaluator(state.step)
    if not row:
        return []
    tools.log(row, state.step)
    return [{"step": state.step, **row}]
