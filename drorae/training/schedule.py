"""A tokenizer phase against the size of its data: epochs become steps, and both are recorded."""

from dataclasses import replace

from drorae.data.order import steps_per_epoch
from drorae.training.jobs import TokenizerTraining

__all__ = ["in_steps", "schedule_record"]


def in_steps(job: TokenizerTraining, num_images: int) -> TokenizerTraining:
    """The same phase with the adversarial starts in steps.

    Raises:
        ValueError: If no batch fits the data, or the discriminator would start after its term.
    """
    per_epoch = steps_per_epoch(num_images, job.batch_images)
    return replace(job, adversarial=job.adversarial.in_steps(per_epoch))


def schedule_record(job: TokenizerTraining, num_images: int) -> dict[str, float]:
    """Length of a phase and, with a discriminator, its starts: in steps and in epochs.

    Args:
        job: The phase, from `in_steps`.
        num_images: Training images; an epoch is whole batches of them.
    """
    per_epoch = steps_per_epoch(num_images, job.batch_images)
    gan = job.adversarial
    steps = {"length": job.num_steps}
    if gan.weight > 0:
        steps |= {"gan_start": gan.start_step, "discriminator_start": gan.learn_from_step}
    record = {"steps_per_epoch": float(per_epoch)}
    for name, step in steps.items():
        record |= {f"{name}_steps": float(step), f"{name}_epochs": step / per_epoch}
    return record
