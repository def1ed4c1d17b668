"""Adversarial losses, their adaptive weight, and the images that a discriminator sees (RAE).

The adaptive weight of Eq. 6 (arXiv:2605.10780) is |dR/dW| / |dG/dW| for the decoder's last weight
W. As printed it needs two extra backward passes through perceptual net, discriminator and decoder
end. Here each loss is differentiated once, down to the image; both weight gradients follow by one
matrix product each, and the decoder is traversed once with the sum:

    gradient, weight = balanced_gradient(images, reconstruction, adversarial, last_layer)
    images.backward(gradient)

Images are in [-1, 1] in this module, except where a docstring says otherwise.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from drorae.shapes import Float, Tensor

__all__ = [
    "ADVERSARIAL_WEIGHT",
    "adaptive_weight",
    "augment",
    "balanced_gradient",
    "discriminator_loss",
    "generator_loss",
    "quantise",
    "to_signed",
]

ADVERSARIAL_WEIGHT = 0.75  # RAE config; the paper says only "adaptive"
MAX_ADAPTIVE_WEIGHT = 1e4  # RAE, generator losses
ADAPTIVE_EPS = 1e-6  # RAE, generator losses
TRANSLATION_SHARE = 0.125  # DiffAug: largest shift as a share of the side


def discriminator_loss(
    real: Float[Tensor, "batch logits"], fake: Float[Tensor, "batch logits"]
) -> Float[Tensor, ""]:
    """Hinge loss of the discriminator: half of each side's mean."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(fake: Float[Tensor, "batch logits"]) -> Float[Tensor, ""]:
    """Hinge loss of the generator: minus the mean logit, from a discriminator in eval mode."""
    return -fake.mean()


def adaptive_weight(
    reconstruction_gradient: Float[Tensor, "*shape"],
    adversarial_gradient: Float[Tensor, "*shape"],
) -> Float[Tensor, ""]:
    """Ratio of gradient norms at the decoder's last weight, clamped to [0, 1e4], detached."""
    ratio = reconstruction_gradient.norm() / (adversarial_gradient.norm() + ADAPTIVE_EPS)
    return ratio.clamp(0.0, MAX_ADAPTIVE_WEIGHT).detach()


def balanced_gradient(
    images: Float[Tensor, "batch 3 height width"],
    reconstruction: Float[Tensor, ""],
    adversarial: Float[Tensor, ""],
    last_layer: Callable[[Tensor], Tensor],
    weight: float = ADVERSARIAL_WEIGHT,
) -> tuple[Float[Tensor, "batch 3 height width"], Float[Tensor, ""]]:
    """Gradient of R + weight * adaptive * G at the decoder's output, and the adaptive weight.

    Frees the graphs of both losses. The caller goes on with `images.backward(gradient)`.

    Args:
        images: Decoder output, in any units, from which both losses were computed.
        reconstruction: R, all reconstruction terms already weighted.
        adversarial: G.
        last_layer: Image gradient to last-weight gradient: `Decoder.last_layer_gradient` with its
            features bound.
        weight: Factor of the adversarial term.
    """
    (by_reconstruction,) = torch.autograd.grad(reconstruction, images)
    (by_adversarial,) = torch.autograd.grad(adversarial, images)
    adaptive = adaptive_weight(last_layer(by_reconstruction), last_layer(by_adversarial))
    return by_reconstruction + weight * adaptive * by_adversarial, adaptive


def to_signed(
    images: Float[Tensor, "batch 3 height width"],
) -> Float[Tensor, "batch 3 height width"]:
    """From [0, 1] to [-1, 1]."""
    return 2 * images - 1


def quantise(
    images: Float[Tensor, "batch 3 height width"],
) -> Float[Tensor, "batch 3 height width"]:
    """Clamp to [-1, 1] and round to 8 bit.

    For fakes in the discriminator's own step, so that it cannot tell them by their precision.
    """
    return torch.round((images.clamp(-1, 1) + 1) * 127.5) / 127.5 - 1


def augment(
    images: Float[Tensor, "batch 3 height width"], generator: torch.Generator
) -> Float[Tensor, "batch 3 height width"]:
    """DiffAug (arXiv:2006.10738) as RAE uses it: translation and colour, always on, no cutout.

    Differentiable in the images; every draw is per sample. Real and fake images are augmented with
    independent draws.

    Args:
        images: In [-1, 1].
        generator: Source of randomness, on any device.
    """
    images = _translate(images.float(), generator)
    images = images + (_draw(images, generator) - 0.5)  # brightness
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * (2 * _draw(images, generator))  # saturation
    centre = images.mean(dim=(1, 2, 3), keepdim=True)
    return centre + (images - centre) * (_draw(images, generator) + 0.5)  # contrast


def _draw(images: Tensor, generator: torch.Generator) -> Tensor:
    """One uniform number per sample, ready to broadcast."""
    values = torch.rand(len(images), 1, 1, 1, generator=generator, device=generator.device)
    return values.to(images.device)


def _translate(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each sample by whole pixels up to an eighth of its side; zeros come in from outside."""
    batch, _, height, width = images.shape
    limits = [round(TRANSLATION_SHARE * side) for side in (height, width)]
    shifts = [
        torch.randint(0, 2 * m + 1, (batch, 1), generator=generator, device=generator.device)
        for m in limits
    ]
    rows, columns = (
        (torch.arange(side, device=images.device) + shift.to(images.device))
        for side, shift in zip((height, width), shifts, strict=True)
    )
    padded = F.pad(images, (limits[1], limits[1], limits[0], limits[0])).permute(0, 2, 3, 1)
    sample = torch.arange(batch, device=images.device)[:, None, None]
    return padded[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
