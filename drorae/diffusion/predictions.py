"""What the output of a network means: the velocity itself, or the clean latents (RAEv2).

The training loss and every sampler read outputs through `to_velocity`, so that what is trained is
what is sampled. The conversion is linear in the output, hence guidance by a difference of outputs
is the same in either reading.
"""

from typing import Literal

from drorae.diffusion.guidance import VelocityModel, check_eval
from drorae.diffusion.interpolation import clean_to_velocity
from drorae.shapes import Float, Tensor

__all__ = ["Prediction", "as_velocity_model", "to_velocity"]

Prediction = Literal["velocity", "clean"]


def to_velocity(
    output: Float[Tensor, "batch ..."],
    noisy: Float[Tensor, "batch ..."],
    t: Float[Tensor, " batch"],
    prediction: Prediction,
) -> Float[Tensor, "batch ..."]:
    """Velocity that an output stands for; `clean` means (noisy - output) / max(t, 0.05).

    Args:
        output: What the network gave at (noisy, t).
        noisy: Point on the path.
        t: One time per sample.
        prediction: What the network was trained to give.

    Raises:
        ValueError: If the prediction is unknown.
    """
    if prediction == "velocity":
        return output
    if prediction == "clean":
        return clean_to_velocity(output, noisy, t)
    raise ValueError(f"prediction={prediction!r} is unknown: expected 'velocity' or 'clean'.")


def as_velocity_model(model: VelocityModel, prediction: Prediction) -> VelocityModel:
    """The network as guidance and solvers want it: every output, the base head's too, a velocity.

    Raises:
        RuntimeError: If the network is in training mode, where it would drop labels.
    """
    check_eval(model)

    def velocity_model(noisy: Tensor, t: Tensor, labels: Tensor, **options: bool) -> object:
        output = model(noisy, t, labels, **options)
        if isinstance(output, tuple):
            return tuple(to_velocity(part, noisy, t, prediction) for part in output)
        return to_velocity(output, noisy, t, prediction)

    return model if prediction == "velocity" else velocity_model
