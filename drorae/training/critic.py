"""The adversarial side of a tokenizer phase: discriminator, optimiser, adaptive weight of Eq. 6.

Order within a step follows RAE: the generator term uses the discriminator in eval mode; after the
generator's update the discriminator learns on fakes from clean latents, clamped and rounded to 8
bits. Differences, on purpose, so that the result does not depend on how a batch is spread over
ranks and parts: augmentation is drawn by position in the global batch, discriminator gradients are
averaged over ranks and parts, and the adaptive weight is computed from gradients averaged likewise.
The discriminator is small and lies whole on every rank, under FSDP2 too.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from drorae.diffusion.noise import uniform
from drorae.losses.adversarial import (
    NUM_DRAWS,
    adaptive_weight,
    augment,
    generator_loss,
    hinge_loss,
    image_gradients,
    quantise,
    to_signed,
)
from drorae.shapes import Float, Int
from drorae.training.guards import FiniteGuard
from drorae.training.jobs import AdversarialConfig
from drorae.training.optim import build_optimizer, learning_rate, set_learning_rate
from drorae.training.parallel import gradient_sync, total_norm
from drorae.training.world import World, mean_over_ranks, wrap_ddp

__all__ = ["Critic", "Judged", "Pull"]


class Pull(NamedTuple):
    """How both losses of one part of a batch pull at its images."""

    by_reconstruction: Tensor
    """Gradient of R at the images, [B, 3, H, W]."""
    by_adversarial: Tensor
    """Gradient of G at the images, [B, 3, H, W]."""
    at_weight: Tensor
    """Both gradients at the decoder's last weight, [2, values, width]."""
    gan: Tensor
    """G."""


class Judged(NamedTuple):
    """One part of a batch as the discriminator sees it."""

    images: Tensor
    """Real images in [0, 1]."""
    fake: Tensor
    """Their reconstructions in [0, 1] units."""
    positions: Tensor
    """Place of each image in the global batch."""


class Critic:
    """Discriminator, optimiser and schedule of one phase.

    Args:
        discriminator: Maps images in [-1,1] to logits.
        config: Weights and starts, both in steps (`AdversarialConfig.in_steps`).
        num_steps: Length of the phase; the schedule counts the discriminator's own steps.
        world: Rank and device.
        seed: Seed of the run; augmentation draws are a function of (seed, step, position in the
            global batch).
        on_non_finite: What a bad step of the discriminator does.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        config: AdversarialConfig,
        *,
        num_steps: int,
        world: World,
        seed: int,
        on_non_finite: Literal["stop", "skip"] = "stop",
    ) -> None:
        assert (config.start_epoch, config.learn_from_epoch) == (None, None), "resolve epochs first"
        self._module = discriminator.to(world.device)
        self._wrapped = wrap_ddp(self._module, world)
        self._config = config
        unlearned = config.learn_from_step if config.schedule_span == "learning" else 0
        self._num_steps = num_steps - unlearned
        self._world = world
        self._seed = seed
        self._optimizer = build_optimizer(self._module, config.optim)
        self.guard = FiniteGuard(self._optimizer, world.device, policy=on_non_finite, world=world)

    def guides(self, step: int) -> bool:
        """Whether the generator loss of this step holds the adversarial term."""
        return step >= self._config.start_step

    def learns(self, step: int) -> bool:
        """Whether the discriminator learns in this step."""
        return step >= self._config.learn_from_step

    def begins(self, step: int) -> bool:
        """Whether the discriminator learns or guides for the first time in this step."""
        return step in (self._config.start_step, self._config.learn_from_step)

    def pull(
        self,
        reconstruction_loss: Float[Tensor, ""],
        recon: Float[Tensor, "batch 3 height width"],
        to_weight: Callable[[Tensor], Tensor],
        positions: Int[Tensor, " batch"],
        step: int,
    ) -> Pull:
        """Gradients of R and G for one part of this rank's batch.

        Args:
            reconstruction_loss: R, a function of `recon` only.
            recon: Images in [0,1] units, detached from the decoder, requiring gradients.
            to_weight: Image gradient to last-weight gradient: `Decoder.last_layer_gradient` with
                its features bound.
            positions: Place of each image in the global batch.
            step: Current step; fixes the augmentation.
        """
        self._module.eval().requires_grad_(False)
        fake = augment(to_signed(recon), self._draws(step, "generator", positions))
        gan = generator_loss(self._module(fake))
        pulls = image_gradients(recon, reconstruction_loss, gan)
        self._module.requires_grad_(True)
        return Pull(*pulls, torch.stack([to_weight(pull) for pull in pulls]), gan.detach())

    def balance(self, pulls: Sequence[Pull]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Gradient of R + lambda_g * w * G at the images of each part, and terms to log.

        w is that of the global batch: one average of both weight gradients over parts and ranks.
        """
        at_weight = sum(pull.at_weight for pull in pulls) / len(pulls)
        assert isinstance(at_weight, Tensor)
        adaptive = adaptive_weight(*mean_over_ranks(at_weight, self._world))
        factor = self._config.weight * adaptive
        gradients = [pull.by_reconstruction + factor * pull.by_adversarial for pull in pulls]
        gan = torch.stack([pull.gan for pull in pulls]).mean()
        return gradients, {"gan": gan, "gan_weight": adaptive}

    def update(self, parts: Sequence[Judged], step: int) -> dict[str, Tensor]:
        """One discriminator step on real images and reconstructions, part by part."""
        self._optimizer.zero_grad(set_to_none=True)
        real = [(part.images, part.positions) for part in parts]
        fake = [(quantise(to_signed(part.fake)), part.positions) for part in parts]
        real = [(to_signed(images), positions) for images, positions in real]
        real_terms = self._add_gradients(real, step, "real", sync=False)
        fake_terms = self._add_gradients(fake, step, "fake", sync=True)
        loss, accuracy = 0.5 * (real_terms + fake_terms)
        norm = total_norm([p.grad for p in self._module.parameters() if p.grad is not None])
        self.guard.arm(step, loss, norm)
        own_step = step - self._config.learn_from_step
        set_learning_rate(
            self._optimizer, learning_rate(self._config.optim, own_step, self._num_steps)
        )
        self._optimizer.step()
        return {"discriminator": loss, "discriminator_accuracy": accuracy}

    def _add_gradients(
        self, parts: Sequence[tuple[Tensor, Tensor]], step: int, use: str, *, sync: bool
    ) -> Tensor:
        """Backward of one side's loss over all parts; returns its mean loss and accuracy."""
        terms = []
        for index, (images, positions) in enumerate(parts):
            # Spectral norm iterates once a side and step, however many parts there are.
            self._module.train(index == 0)
            with gradient_sync(self._wrapped, sync and index == len(parts) - 1):
                logits = self._wrapped(augment(images, self._draws(step, use, positions)))
                loss = hinge_loss(logits, real=use == "real")
                (0.5 * loss / len(parts)).backward()
            right = (logits > 0 if use == "real" else logits < 0).float().mean()
            terms.append(torch.stack([loss.detach(), right]))
        return torch.stack(terms).mean(0)

    def _draws(
        self, step: int, use: str, positions: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch draws"]:
        """Uniform numbers of the given places in the global batch."""
        stream = f"critic/{use}/{step}"
        return uniform(self._seed, stream, positions, (NUM_DRAWS,), self._world.device)

    def state_dict(self) -> dict[str, Any]:
        """Trained heads (spectral-norm vectors included), optimiser and counts of bad steps."""
        return {
            "module": self._module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "guard": self.guard.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.guard.load_state_dict(state["guard"])
