"""Adversarial losses, their adaptive weight, and the images that a discriminator sees (RAE).

The adaptive weight of Eq. 6 (arXiv:2605.10780) is |dR/dW| / |dG/dW| for the decoder's last weight
W. As printed it needs two extra backward passes through perceptual net, discriminator and decoder
end. Here each loss is differentiated once, down to the image; both weight gradients follow by one
matrix product each, and the decoder is traversed once with the sum:

    by_reconstruction, by_adversarial = image_gradients(images, reconstruction, adversarial)
    weight = adaptive_weight(last_layer(by_reconstruction), last_layer(by_adversarial))
    images.backward(by_reconstruction + ADVERSARIAL_WEIGHT * weight * by_adversarial)

Where a batch is spread over ranks or worked through in parts, both gradients at W are averaged over
all of them before their norms are taken: the weight is that of the whole batch.

Images are in [-1, 1] in this module, except where a docstring says otherwise.
"""

import torch
import torch.nn.functional as F

from drorae.shapes import Float, Tensor

__all__ = [
    "ADVERSARIAL_WEIGHT",
    "NUM_DRAWS",
    "adaptive_weight",
    "augment",
    "generator_loss",
    "hinge_loss",
    "image_gradients",
    "quantise",
    "to_signed",
]

ADVERSARIAL_WEIGHT = 0.75  # RAE config; the paper says only "adaptive"
MAX_ADAPTIVE_WEIGHT = 1e4  # RAE, generator losses
ADAPTIVE_EPS = 1e-6  # RAE, generator losses
TRANSLATION_SHARE = 0.125  # DiffAug: largest shift as a share of the side
NUM_DRAWS = 5  # uniform numbers that `augment` takes for one sample


def hinge_loss(logits: Float[Tensor, "batch logits"], *, real: bool) -> Float[Tensor, ""]:
    """Hinge loss of the discriminator on one side; its whole loss is half the sum of both sides."""
    return F.relu(1 - logits if real else 1 + logits).mean()


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


def image_gradients(
    images: Float[Tensor, "batch 3 height width"],
    reconstruction: Float[Tensor, ""],
    adversarial: Float[Tensor, ""],
) -> tuple[Float[Tensor, "batch 3 height width"], Float[Tensor, "batch 3 height width"]]:
    """Gradients of R and of G at the images. Frees the graphs of both losses.

    Args:
        images: Decoder output, in any units, from which both losses were computed; best a detached
            copy, which keeps the decoder's graph out of this.
        reconstruction: R, all reconstruction terms already weighted.
        adversarial: G.
    """
    (by_reconstruction,) = torch.autograd.grad(reconstruction, images)
    (by_adversarial,) = torch.autograd.grad(adversarial, images)
    return by_reconstruction, by_adversarial


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
    images: Float[Tensor, "batch 3 height width"], draws: Float[Tensor, "batch draws"]
) -> Float[Tensor, "batch 3 height width"]:
    """DiffAug (arXiv:2006.10738) as RAE uses it: translation and colour, always on, no cutout.

    Differentiable in the images. A sample's augmentation depends on its own draws alone. Real and
    fake images are augmented with independent draws.

    Args:
        images: In [-1, 1].
        draws: `NUM_DRAWS` uniform numbers in [0, 1) for each sample: rows, columns, brightness,
            saturation, contrast.
    """
    images = _translate(images.float(), draws[:, :2])
    brightness, saturation, contrast = (draws[:, i].view(-1, 1, 1, 1) for i in range(2, NUM_DRAWS))
    images = images + (brightness - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * (2 * saturation)
    centre = images.mean(dim=(1, 2, 3), keepdim=True)
    return centre + (images - centre) * (contrast + 0.5)


def _translate(images: Tensor, draws: Tensor) -> Tensor:
    """Shift each sample by whole pixels up to an eighth of its side; zeros come in from outside."""
    batch, _, height, width = images.shape
    limits = [round(TRANSLATION_SHARE * side) for side in (height, width)]
    rows, columns = (
        torch.arange(side, device=images.device) + (draw * (2 * m + 1)).long()[:, None]
        for side, draw, m in zip((height, width), draws.unbind(1), limits, strict=True)
    )
    padded = F.pad(images, (limits[1], limits[1], limits[0], limits[0])).permute(0, 2, 3, 1)
    sample = torch.arange(batch, device=images.device)[:, None, None]
    return padded[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
