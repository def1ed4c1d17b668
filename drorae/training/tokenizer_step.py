"""One step of a tokenizer phase: parts of a batch, the trained module's update, the critic's.

A rank's share of a batch is worked through in `compute.accumulate_steps` parts. The adaptive weight
of Eq. 6 needs both gradients of the whole batch at the decoder's last weight before the first
backward pass of the decoder. With one part its forward pass is kept for that; with several, a first
pass without gradients measures, and a second one learns: one more forward pass, the memory of one
part, and the weight of the whole batch. Both passes start torch's generators alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from drorae.diffusion.noise import noise, uniform
from drorae.losses.reconstruction import l1_per_image
from drorae.models.autoencoder import add_latent_noise
from drorae.models.fusion import FusionOutput
from drorae.shapes import Float, Int
from drorae.training.critic import Critic, Judged
from drorae.training.intervals import mean_terms
from drorae.training.jobs import TokenizerTraining
from drorae.training.state import TrainState, apply_update, seed_part
from drorae.training.watchdog import unhurried
from drorae.training.world import autocast

__all__ = ["Part", "TokenizerPhase", "TokenizerStep", "noised"]

NOISE_STREAM = "latent/noise"  # separate the draws of latent noise from every other use of the seed
SIGMA_STREAM = "latent/sigma"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerPhase:
    """What is trained and how hidden states become an image."""

    name: str
    trainable: nn.Module
    """Module whose parameters are updated, as `parallel.distribute` gave it."""
    encode: Callable[[Tensor], FusionOutput]
    """Hidden states to latent tokens."""
    decode: Callable[..., Tensor]
    """Latent tokens to images in [0,1] units; `with_features=True` as `Decoder` knows it."""
    last_layer_gradient: Callable[[Tensor, Tensor], Tensor]
    """Of features and image gradient: the gradient at the decoder's last weight (Eq. 6)."""


class Part(NamedTuple):
    """What is worked through at once."""

    number: int
    """Place among this rank's parts."""
    positions: Tensor
    """Place of each image in the global batch."""
    images: Tensor
    """Targets in [0, 1]."""
    hidden: Tensor
    """Encoder hidden states."""


class Reconstruction(NamedTuple):
    """A part after the forward pass."""

    images: Tensor
    """In [0, 1] units, float32."""
    features: Tensor | None
    """Input of the decoder's last layer, where it is needed."""
    fused: FusionOutput
    """Latents before the noise, and the fusion's own loss term."""


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
    device = latent.device
    if job.noise_kind == "uniform":
        sigma = uniform(seed, SIGMA_STREAM, indices, (), device)
    else:
        sigma = noise(seed, SIGMA_STREAM, indices, (), device).abs()
    drawn = noise(seed, NOISE_STREAM, indices, latent.shape[1:], device)
    return add_latent_noise(latent, (job.noise_tau * sigma).to(latent), drawn.to(latent))


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerStep:
    """The arithmetic of a step; what changes is in the state and the critic."""

    job: TokenizerTraining
    phase: TokenizerPhase
    lpips: Callable[[Tensor, Tensor], Tensor] | None
    critic: Critic | None
    seed: int

    def run(self, state: TrainState, parts: Sequence[Part]) -> dict[str, Tensor]:
        """Update the trained module, then the discriminator; returns terms to log."""
        step, critic = state.step, self.critic
        if critic is not None and critic.begins(step):
            # A compiled network is compiled once more for it.
            with unhurried("first step with the discriminator"):
                return self._run(state, parts)
        return self._run(state, parts)

    def _run(self, state: TrainState, parts: Sequence[Part]) -> dict[str, Tensor]:
        step, critic = state.step, self.critic
        if critic is not None and critic.guides(step):
            terms = self._follow_critic(state, parts, critic)
        else:
            terms = self._reconstruct_only(state, parts)
        if critic is not None and critic.learns(step):
            judged = [Judged(p.images, self._clean(p, state), p.positions) for p in parts]
            terms |= critic.update(judged, step)
        return terms

    def _reconstruct_only(self, state: TrainState, parts: Sequence[Part]) -> dict[str, Tensor]:
        rows: list[dict[str, Tensor]] = []

        def loss_of(part: Part) -> Tensor:
            recon = self._reconstruct(part, state)
            rows.append(self._losses(recon.images, part.images, recon.fused))
            return rows[-1]["loss"] + recon.fused.penalty

        grad_norm = apply_update(state, parts, loss_of)
        return mean_terms(rows) | {"grad_norm": grad_norm}

    def _follow_critic(
        self, state: TrainState, parts: Sequence[Part], critic: Critic
    ) -> dict[str, Tensor]:
        rows, pulls, step = [], [], state.step
        recon: Reconstruction | None = None
        for part in parts:
            seed_part(self.seed, step, state.world, part.number)
            with torch.set_grad_enabled(len(parts) == 1):
                recon = self._reconstruct(part, state, with_features=True)
            images = recon.images.detach().requires_grad_()
            rows.append(self._losses(images, part.images, recon.fused))
            assert recon.features is not None
            to_weight = partial(self.phase.last_layer_gradient, recon.features)
            pulls.append(critic.pull(rows[-1]["loss"], images, to_weight, part.positions, step))
        gradients, terms = critic.balance(pulls)
        kept = recon if len(parts) == 1 else None

        def loss_of(part: Part) -> Tensor:
            # A surrogate: its value is not R + ..., its gradient is.
            again = kept or self._reconstruct(part, state)
            return (again.images * gradients[part.number]).sum() + again.fused.penalty

        grad_norm = apply_update(state, parts, loss_of)
        return mean_terms(rows) | terms | {"grad_norm": grad_norm}

    def _reconstruct(
        self, part: Part, state: TrainState, *, with_features: bool = False
    ) -> Reconstruction:
        noise_ids = state.step * self.job.batch_images + part.positions
        with autocast(part.images.device, self.job.precision):
            fused = self.phase.encode(part.hidden)
            latent = noised(fused.latent, self.job, self.seed, noise_ids)
            if not with_features:
                return Reconstruction(self.phase.decode(latent).float(), None, fused)
            images, features = self.phase.decode(latent, with_features=True)
        return Reconstruction(images.float(), features, fused)

    def _losses(self, recon: Tensor, images: Tensor, fused: FusionOutput) -> dict[str, Tensor]:
        l1 = l1_per_image(recon, images).mean()
        perceptual = torch.zeros_like(l1)
        if self.lpips is not None:
            perceptual = self.lpips(recon, images).mean()
        loss = self.job.l1_weight * l1 + self.job.lpips_weight * perceptual
        terms = {"loss": loss, "l1": l1, "lpips": perceptual}
        if fused.router_norm is not None:  # Eq. 4 leaves it free, so it can drift
            terms["router_norm"] = fused.router_norm
        return terms

    @torch.no_grad()
    def _clean(self, part: Part, state: TrainState) -> Tensor:
        """Reconstruction of clean latents with the updated weights, outside of autocast."""
        seed_part(self.seed, state.step, state.world, part.number)
        return self.phase.decode(self.phase.encode(part.hidden).latent).float()
