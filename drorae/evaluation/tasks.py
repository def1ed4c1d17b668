"""What `evaluate` has to do, cut into restartable tasks, and where each leaves its results.

A task reconstructs some photos, draws some samples, reads some training photos or looks inside the
fusion; a second kind compares one set of features with the reference photos. Boundaries, and the
batches inside a task, follow from the settings alone, so no number depends on how many actors there
are or on which of them did what.

A sample is a function of (seed, global index) alone: index i has class i modulo the number of
classes, which makes the labels balanced (RAE: equal label sampling is worth about 0.1 FID), and the
same noise under every guidance, which makes rows of a table comparable image by image. Two ceilings
are measured beside the samples: real training photos, and reconstructions of the reference photos
by the decoder that draws the samples; the floor is the network freshly initialised.
"""

from dataclasses import dataclass

from drorae.data.shard_map import ShardTask
from drorae.diffusion.guidance import GuidanceConfig
from drorae.evaluation.inference import SamplerSettings
from drorae.evaluation.job import EvaluateJob
from drorae.evaluation.stored import StoredSet

__all__ = [
    "PHOTOS",
    "REAL",
    "Extent",
    "decoder_stages",
    "feature_sets",
    "image_tasks",
    "measure_tasks",
    "photo_set",
    "sampler_settings",
    "set_name",
]

SWAPPED = ("unguided", "autoguidance")
"""Guidances whose latents are decoded by both decoders: the two columns of the paper's table 4."""
PHOTOS, REAL = "photos", "real"
"""Sets of held-out photos, the reference, and of training photos."""
RECONSTRUCTION = "reconstruction"
"""Set of reconstructions by the decoder that draws the samples, at most as many as samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """How much there is to measure in one run."""

    num_photos: int
    """Held-out photos."""
    num_real: int
    """Training photos."""
    models: tuple[str, ...]
    """Models whose reconstructions are measured."""


def image_tasks(evaluate: EvaluateJob, extent: Extent) -> list[ShardTask]:
    """Everything that makes pictures, in a fixed order; sizes are passes through a network."""
    inspected = min(evaluate.num_diagnostic_images, extent.num_photos)
    inspect = ShardTask("inspect", {"kind": "inspect"}, size=6 * inspected)
    passes = 2 + 3 * len(extent.models)
    tasks = _chunks("reconstruct", extent.num_photos, evaluate.chunk_photos, passes)
    tasks += [inspect, *_chunks(REAL, extent.num_real, evaluate.chunk_photos, 1)]
    steps = (evaluate.num_grid_points - 1) * (2 if evaluate.sampler == "heun" else 1)
    for guidance in evaluate.guidances:
        networks = 2 if guidance in ("cfg", "autoguidance") else 1
        passes = steps * networks + 2 * len(decoder_stages(guidance, evaluate))
        tasks += _chunks(guidance, evaluate.num_samples, evaluate.chunk_samples, passes)
    return tasks


def feature_sets(evaluate: EvaluateJob, extent: Extent) -> dict[str, StoredSet]:
    """Every set that is compared with the reference, by its name in the results."""
    sets: dict[str, StoredSet] = {}
    for guidance in evaluate.guidances:
        for stage in decoder_stages(guidance, evaluate):
            name = set_name(guidance, stage, evaluate)
            sets[name] = StoredSet(
                folder=name,
                num_images=evaluate.num_samples,
                chunk=evaluate.chunk_samples,
                decoder=stage,
            )
    chunk = evaluate.chunk_photos
    for model in extent.models:
        name = photo_set(model, evaluate, extent)
        sets[name] = StoredSet(
            folder=f"{PHOTOS}-{model}", num_images=extent.num_photos, chunk=chunk
        )
    sets[RECONSTRUCTION] = StoredSet(
        folder=f"{PHOTOS}-{_drawn_by(evaluate)}",
        num_images=min(extent.num_photos, evaluate.num_samples),
        chunk=chunk,
        decoder=evaluate.decoder_for_samples,
    )
    sets[REAL] = StoredSet(folder=REAL, num_images=extent.num_real, chunk=chunk)
    return sets


def measure_tasks(evaluate: EvaluateJob, extent: Extent) -> list[ShardTask]:
    """One comparison a set; the first is cross-checked with torch-fidelity.

    Of all reconstructions of a model the Frechet distance alone is wanted.
    """
    return [
        ShardTask(
            f"measure-{name.replace('/', '-')}",
            {
                "set": name,
                "cross_check": number == 0,
                "frechet_only": name.startswith(f"{PHOTOS}/"),
            },
        )
        for number, name in enumerate(feature_sets(evaluate, extent))
    ]


def photo_set(model: str, evaluate: EvaluateJob, extent: Extent) -> str:
    """Name of the set with a model's reconstructions of all photos.

    It is the set of reconstructions that stands beside the samples where that one has as many.
    """
    is_measured = model == _drawn_by(evaluate) and extent.num_photos <= evaluate.num_samples
    return RECONSTRUCTION if is_measured else f"{PHOTOS}/{model}"


def _drawn_by(evaluate: EvaluateJob) -> str:
    return "finetune" if evaluate.decoder_for_samples == "finetune" else "fusion"


def decoder_stages(guidance: str, evaluate: EvaluateJob) -> list[str]:
    """Decoders for a guidance: the chosen one first, then the other where a swap is measured."""
    chosen = evaluate.decoder_for_samples
    other = "decoder" if chosen == "finetune" else "finetune"
    return [chosen, other] if guidance in SWAPPED else [chosen]


def set_name(guidance: str, stage: str, evaluate: EvaluateJob) -> str:
    """`cfg` for the chosen decoder, `cfg@decoder` for the swapped one."""
    return guidance if stage == evaluate.decoder_for_samples else f"{guidance}@{stage}"


def sampler_settings(guidance: str, evaluate: EvaluateJob) -> SamplerSettings:
    """Solver settings of one way of sampling."""
    return SamplerSettings(
        guidance=_guidance_config(guidance, evaluate),
        sampler=evaluate.sampler,
        churn=evaluate.sde_churn,
        num_grid_points=evaluate.num_grid_points,
        grid_end=evaluate.grid_end,
    )


def _guidance_config(guidance: str, evaluate: EvaluateJob) -> GuidanceConfig:
    if guidance not in ("cfg", "autoguidance", "internal"):
        return GuidanceConfig()
    is_internal = guidance == "internal"
    low, high = evaluate.internal_interval if is_internal else evaluate.guidance_interval
    scale = getattr(evaluate, f"{guidance}_scale")
    return GuidanceConfig(kind=guidance, scale=scale, t_min=low, t_max=high)


def _chunks(kind: str, total: int, chunk: int, passes: int) -> list[ShardTask]:
    return [
        ShardTask(
            f"{kind}-{start:08d}",
            {"kind": kind, "start": start, "stop": min(start + chunk, total)},
            size=passes * (min(start + chunk, total) - start),
        )
        for start in range(0, total, chunk)
    ]
