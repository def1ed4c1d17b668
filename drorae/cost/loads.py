"""What an image of each stage costs the GPU, the CPU and the network, for `drorae.cost.budgets`."""

from drorae.cost.budgets import COPIES_SENT, Load
from drorae.cost.run import HALF_BYTES, SOURCE_BYTES, TOKENIZER_STAGES, RunCost
from drorae.cost.stages import StageCost
from drorae.recipes.full import FullJob
from drorae.training.jobs import DiffusionStage, TokenizerTraining

__all__ = ["LATENT_CPU_S", "LOOP_S", "SHARD_CPU_S", "count_loads", "shard_cpu_s"]

LOOP_S = 3e-3
"""Loop thread in a step of 32 samples, launches left out: the most that the tests allow."""
LATENT_CPU_S = 60e-6
"""One latent of 768 x 16 x 16 from a mapped shard into a batch of float16, one core. Measured
2026-11-25."""
LATENT_VALUES = 768 * 16 * 16
SHARD_CPU_S = 25e-3
"""One photograph of 500 x 375 in stage `shard`: decoded, checked, cut to 256 px, stored. The most
that `python -m tests.rehearsal` allows; 21.1 ms measured 2026-11-25."""
SQUARE_CPU_S = 3.0e-3
"""A PNG of 256 x 256 decoded, one core. Measured 2026-11-25 with Pillow."""
CROP_CPU_S = 9.7e-3
"""A random crop of 256 px from a JPEG of 500 x 375 through a view of 384 px, one core. Measured
2026-11-25: torchvision with Pillow, the speed that the loader has to have."""
SQUARE_PX = 256
SOURCE_CPU_S = 5.1e-3
"""A JPEG of 500 x 375 decoded and made a square of 256 px, likewise."""
SQUARE_BYTES = 108e3
"""A PNG of 256 x 256. Measured 2026-11-25."""


def count_loads(full: FullJob, cost: RunCost, peak_tflops: float, mfu: float) -> list[Load]:
    """Loads of the stages that were counted and that go through images with a GPU in steps.

    Args:
        full: The configuration.
        cost: Its count.
        peak_tflops: Peak rate of a GPU in bfloat16, 10^12 FLOPs a second.
        mfu: Share of the peak that is reached.
    """
    loads = []
    for stage in cost.stages:
        gpu_s = stage.gpu_hours(peak_tflops, mfu) * 3600 / stage.images
        if stage.stage in TOKENIZER_STAGES:
            job = getattr(full, stage.stage).train
            loads.append(_tokenizer(full, stage, job, gpu_s))
        elif stage.stage in ("diffusion", "guide"):
            loads.append(_diffusion(full, stage, getattr(full, stage.stage), gpu_s))
        elif stage.stage == "latents":
            loads.append(_latents(full, cost.num_train_images, stage, gpu_s))
    return loads


def shard_cpu_s(full: FullJob, num_images: int) -> float:
    """CPU seconds of stage `shard`; where it keeps the files it makes no squares of any size."""
    return num_images * SHARD_CPU_S * (1.0 if full.shard.pictures == "source" else _area(full))


def _tokenizer(full: FullJob, stage: StageCost, job: TokenizerTraining, gpu_s: float) -> Load:
    cpu_s, read_bytes = _picture(full)
    return Load(
        stage=stage.stage,
        images=stage.images,
        step_images=job.batch_images,
        gpu_s=gpu_s,
        loop_s=LOOP_S,
        cpu_s=_area(full) * CROP_CPU_S if job.view == "random_crop" else cpu_s,
        read_bytes=read_bytes,
        gradient_bytes=stage.memory["none"].gradients,
        copies=COPIES_SENT[full.compute.sharding],
        halved=full.compute.reduce_dtype == "bfloat16",
    )


def _diffusion(full: FullJob, stage: StageCost, job: DiffusionStage, gpu_s: float) -> Load:
    values = full.encoder.width * full.encoder.grid**2
    return Load(
        stage=stage.stage,
        images=stage.images,
        step_images=job.batch_images,
        gpu_s=gpu_s,
        loop_s=LOOP_S,
        cpu_s=LATENT_CPU_S * values / LATENT_VALUES,
        read_bytes=HALF_BYTES * values * (2 if full.latents.flip else 1),  # both views of a shard
        gradient_bytes=stage.memory["none"].gradients,
        copies=COPIES_SENT[full.compute.sharding],
        halved=full.compute.reduce_dtype == "bfloat16",
    )


def _latents(full: FullJob, num_images: int, stage: StageCost, gpu_s: float) -> Load:
    views = stage.images / num_images
    cpu_s, read_bytes = _picture(full)
    return Load(
        stage=stage.stage,
        images=num_images,
        step_images=full.latents.batch_images,
        grows=True,
        gpu_s=gpu_s * views,
        cpu_s=cpu_s + LATENT_CPU_S * views,
        read_bytes=read_bytes,
    )


def _picture(full: FullJob) -> tuple[float, float]:
    """CPU seconds and bytes of a square as it is read from a shard."""
    if full.shard.pictures == "source":
        return SOURCE_CPU_S, SOURCE_BYTES
    return SQUARE_CPU_S * _area(full), SQUARE_BYTES * _area(full)


def _area(full: FullJob) -> float:
    return (full.shard.resolution_px / SQUARE_PX) ** 2
