"""The straight path from clean latents to noise, its velocity, and conversions of predictions.

noisy = (1 - t) * clean + t * noise with t = 0 clean and t = 1 noise, so velocity = noise - clean.
Times are not checked against [0, 1] here: on a GPU that would cost a synchronisation a step;
`drorae.diffusion.times` draws them in range.
Source: RAE, linear path of its transport; RAEv2 for the floor under t.
"""

import torch

from drorae.shapes import Float, Tensor

__all__ = [
    "MIN_DENOMINATOR_T",
    "add_noise",
    "clean_to_velocity",
    "noise_to_velocity",
    "velocity_loss",
    "velocity_target",
    "velocity_to_clean",
    "velocity_to_noise",
    "velocity_to_score",
]

MIN_DENOMINATOR_T = 0.05
"""Floor under t where a clean prediction is divided by t. Source: RAEv2 transport."""


def add_noise(
    clean: Float[Tensor, "batch ..."],
    noise: Float[Tensor, "batch ..."],
    t: Float[Tensor, " batch"],
) -> Float[Tensor, "batch ..."]:
    """Mix clean latents with noise: (1 - t) * clean + t * noise.

    Args:
        clean: Normalised latents.
        noise: Standard normal draw of the same shape.
        t: One time per sample in [0, 1].

    Raises:
        ValueError: If the shapes differ, or `t` does not hold one time per sample.
    """
    if clean.shape != noise.shape:
        raise ValueError(
            f"clean {tuple(clean.shape)} and noise {tuple(noise.shape)} differ in shape: expected "
            "equal shapes; "
            "draw the noise with the shape of the latents."
        )
    t = _per_sample(t, clean)
    return (1 - t) * clean + t * noise


def velocity_target(
    clean: Float[Tensor, "batch ..."], noise: Float[Tensor, "batch ..."]
) -> Float[Tensor, "batch ..."]:
    """What the network learns: d noisy / d t = noise - clean, the same at every t."""
    return noise - clean


def velocity_loss(
    velocity: Float[Tensor, "batch ..."],
    clean: Float[Tensor, "batch ..."],
    noise: Float[Tensor, "batch ..."],
) -> Float[Tensor, " batch"]:
    """Mean squared velocity error of each sample, in at least float32.

    Its mean over the batch is the loss of RAE.

    Args:
        velocity: Prediction at `add_noise(clean, noise, t)`.
        clean: The latents that were mixed.
        noise: The noise that was mixed in.
    """
    dtype = torch.promote_types(velocity.dtype, torch.float32)
    error = velocity.to(dtype) - velocity_target(clean, noise).to(dtype)
    return error.square().flatten(1).mean(dim=1)


def velocity_to_clean(
    velocity: Float[Tensor, "batch ..."],
    noisy: Float[Tensor, "batch ..."],
    t: Float[Tensor, " batch"],
) -> Float[Tensor, "batch ..."]:
    """Clean latents that the velocity points back to: noisy - t * velocity."""
    return noisy - _per_sample(t, noisy) * velocity


def velocity_to_noise(
    velocity: Float[Tensor, "batch ..."],
    noisy: Float[Tensor, "batch ..."],
    t: Float[Tensor, " batch"],
) -> Float[Tensor, "batch ..."]:
    """Noise that the velocity points to: noisy + (1 - t) * velocity."""
    return noisy + (1 - _per_sample(t, noisy)) * velocity


def velocity_to_score(
    velocity: Float[Tensor, "batch ..."],
    noisy: Float[Tensor, "batch ..."],
    t: Float[Tensor, " batch"],
) -> Float[Tensor, "batch ..."]:
    """Gradient of the log density at t: minus the predicted noise over t. Times must be above 0."""
    return -velocity_to_noise(velocity, noisy, t) / _per_sample(t, noisy)


def clean_to_velocity(
    clean: Float[Tensor, "batch ..."],
    noisy: Float[Tensor, "batch ..."],
    t: Float[Tensor, " batch"],
    min_t: float = MIN_DENOMINATOR_T,
) -> Float[Tensor, "batch ..."]:
    """Velocity of a clean prediction: (noisy - clean) / max(t, min_t).

    Args:
        clean: Predicted clean latents.
        noisy: Point on the path.
        t: One time per sample.
        min_t: Floor of the divisor; below it the velocity is too small, which bounds the loss near
            t = 0. 0 gives the exact inverse of `velocity_to_clean`.
    """
    return (noisy - clean) / _per_sample(t, noisy).clamp_min(min_t)


def noise_to_velocity(
    noise: Float[Tensor, "batch ..."],
    noisy: Float[Tensor, "batch ..."],
    t: Float[Tensor, " batch"],
    min_remaining: float = MIN_DENOMINATOR_T,
) -> Float[Tensor, "batch ..."]:
    """Velocity of a noise prediction: (noise - noisy) / max(1 - t, min_remaining).

    Args:
        noise: Predicted noise.
        noisy: Point on the path.
        t: One time per sample.
        min_remaining: Floor of the divisor near t = 1. 0 gives the exact inverse of
            `velocity_to_noise`.
    """
    return (noise - noisy) / (1 - _per_sample(t, noisy)).clamp_min(min_remaining)


def _per_sample(t: Tensor, like: Tensor) -> Tensor:
    if t.shape != like.shape[:1]:
        raise ValueError(
            f"t has shape {tuple(t.shape)}: expected one time for each of {like.shape[0]} samples."
        )
    return t.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
