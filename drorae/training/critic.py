"""The adversarial side of a tokenizer phase: discriminator, optimiser, adaptive weight of Eq. 6.

Order within a step follows RAE: the generator term uses the discriminator in eval mode; after the
generator's update the discriminator learns on fakes from clean latents, clamped and rounded to 8
bits. Differences, on purpose: discriminator gradients are averaged over ranks, and the adaptive
weight is computed from rank-averaged gradients, so that every rank applies the same weight.
"""

from typing import Any

import torch
from torch import Tensor, nn

from drorae.diffusion.noise import sample_generator
from drorae.losses.adversarial import (
    augment,
    balanced_gradient,
    discriminator_loss,
    generator_loss,
    quantise,
    to_signed,
)
from drorae.shapes import Float
from drorae.training.jobs import AdversarialConfig
from drorae.training.optim import build_optimizer, learning_rate, set_learning_rate
from drorae.training.world import World, mean_over_ranks, wrap_ddp

__all__ = ["Critic"]


class Critic:
    """Discriminator, optimiser and schedule of one phase.

    Args:
        discriminator: Maps images in [-1,1] to logits.
        config: Weights and starts, both in steps (`AdversarialConfig.in_steps`).
        num_steps: Length of the phase; the schedule counts the discriminator's own steps.
        world: Rank and device.
        seed: Seed of the run; augmentation draws are a function of (seed, step, rank).
    """

    def __init__(
        self,
        discriminator: nn.Module,
        config: AdversarialConfig,
        *,
        num_steps: int,
        world: World,
        seed: int,
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

    def guides(self, step: int) -> bool:
        """Whether the generator loss of this step holds the adversarial term."""
        return step >= self._config.start_step

    def learns(self, step: int) -> bool:
        """Whether the discriminator learns in this step."""
        return step >= self._config.learn_from_step

    def add_to(
        self,
        reconstruction_loss: Float[Tensor, ""],
        recon: Float[Tensor, "batch 3 height width"],
        last_layer: Tensor,
        step: int,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Loss whose gradient is that of R + lambda_g * w * L_g, at the cost of one backward each.

        The returned scalar is a surrogate: its value is not R + ..., its gradient is.

        Args:
            reconstruction_loss: R, a function of `recon` only.
            recon: The decoder's images in [0,1].
            last_layer: Weight at which the gradients are compared.
            step: Current step; fixes the augmentation.
        """
        self._module.eval().requires_grad_(False)
        fake = augment(to_signed(recon), self._generator(step, "generator"))
        gan = generator_loss(self._module(fake))

        def to_weight(gradient: Tensor) -> Tensor:
            by_weight = torch.autograd.grad(recon, last_layer, gradient, retain_graph=True)[0]
            return mean_over_ranks(by_weight.detach().clone(), self._world)

        gradient, adaptive = balanced_gradient(
            recon, reconstruction_loss, gan, to_weight, self._config.weight
        )
        self._module.requires_grad_(True)
        return (recon * gradient.detach()).sum(), {"gan": gan.detach(), "gan_weight": adaptive}

    def update(
        self,
        images: Float[Tensor, "batch 3 height width"],
        fake: Float[Tensor, "batch 3 height width"],
        step: int,
    ) -> dict[str, Tensor]:
        """One discriminator step on real images and reconstructions, both in [0,1]."""
        self._module.train()
        real_logits = self._wrapped(augment(to_signed(images), self._generator(step, "real")))
        rounded = quantise(to_signed(fake))
        fake_logits = self._wrapped(augment(rounded, self._generator(step, "fake")))
        loss = discriminator_loss(real_logits, fake_logits)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        own_step = step - self._config.learn_from_step
        set_learning_rate(
            self._optimizer, learning_rate(self._config.optim, own_step, self._num_steps)
        )
        self._optimizer.step()
        accuracy = 0.5 * ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean())
        return {"discriminator": loss.detach(), "discriminator_accuracy": accuracy.detach()}

    def _generator(self, step: int, use: str) -> torch.Generator:
        return sample_generator(self._seed, step, f"critic/{use}/{self._world.rank}")

    def state_dict(self) -> dict[str, Any]:
        """Trained heads (spectral-norm vectors included) and optimiser."""
        return {"module": self._module.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
