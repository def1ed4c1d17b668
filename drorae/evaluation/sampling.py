"""Generated images as restartable tasks: a chunk of sample indices under one guidance.

A sample is a function of (seed, global index) alone: index i has class i modulo the number of
classes, which makes the labels balanced (RAE: equal label sampling is worth about 0.1 FID), and the
same noise under every guidance, which makes rows of a table comparable image by image. Chunks are
decoded where they are drawn, so only bytes are stored.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from drorae.data.shard_map import ShardTask
from drorae.diffusion.guidance import GuidanceConfig
from drorae.evaluation.inference import SamplerSettings
from drorae.evaluation.job import EvaluateJob
from drorae.evaluation.loading import load_generator, load_tokenizer
from drorae.models.encoder import EncoderConfig
from drorae.store import files
from drorae.store.workspace import StageOutput

__all__ = [
    "SWAPPED",
    "SampleWorker",
    "WorkerInputs",
    "read_chunk",
    "sample_tasks",
    "sampler_settings",
]

SWAPPED = ("unguided", "autoguidance")
"""Guidances whose latents are decoded by both decoders: the two columns of the paper's table 4."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerInputs:
    """What a sampling actor is built from; small, so that it can be shipped."""

    outputs: dict[str, StageOutput]
    encoder: EncoderConfig
    evaluate: EvaluateJob
    seed: int
    work_uri: str
    use_gpu: bool


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
    own = guidance == "internal"
    low, high = evaluate.internal_interval if own else evaluate.guidance_interval
    scale = getattr(evaluate, f"{guidance}_scale")
    return GuidanceConfig(kind=guidance, scale=scale, t_min=low, t_max=high)


def sample_tasks(evaluate: EvaluateJob) -> list[ShardTask]:
    """Chunks of indices for every guidance, in a fixed order."""
    tasks = []
    for guidance in evaluate.guidances:
        for start in range(0, evaluate.num_samples, evaluate.chunk_samples):
            stop = min(start + evaluate.chunk_samples, evaluate.num_samples)
            payload = {"guidance": guidance, "start": start, "stop": stop}
            tasks.append(ShardTask(f"{guidance}-{start:08d}", payload))
    return tasks


class SampleWorker:
    """Draws, decodes and stores one chunk per call.

    Args:
        inputs: Models and settings.
    """

    def __init__(self, inputs: WorkerInputs) -> None:
        device = "cuda" if inputs.use_gpu else "cpu"
        self.inputs = inputs
        self.tokenizer = load_tokenizer(inputs.outputs, device=device, encoder=inputs.encoder)
        self.generator = load_generator(inputs.outputs, device=device)
        self.floor = self.generator.untrained(inputs.seed)

    def __call__(self, task: ShardTask) -> dict[str, Any]:
        """Images of one chunk, one array per decoder, as one npz file."""
        evaluate, guidance = self.inputs.evaluate, task.payload["guidance"]
        indices = range(task.payload["start"], task.payload["stop"])
        generator = self.floor if guidance == "untrained" else self.generator
        settings = sampler_settings(guidance, evaluate)
        stages = decoder_stages(guidance, evaluate)
        images: dict[str, list[np.ndarray]] = {stage: [] for stage in stages}
        for start in range(0, len(indices), evaluate.batch_images):
            batch = indices[start : start + evaluate.batch_images]
            labels = torch.tensor([i % generator.num_classes for i in batch])
            latents = generator.sample(labels, list(batch), settings, self.inputs.seed)
            for stage in stages:
                images[stage].append(self.tokenizer.decode(latents, stage).numpy())
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {stage: np.concatenate(parts) for stage, parts in images.items()}
        np.savez(buffer, **arrays)
        uri = files.join(self.inputs.work_uri, "samples", f"{task.name}.npz")
        entry = files.write_bytes(uri, buffer.getvalue())
        return {"guidance": guidance, "uri": uri, "sha256": entry.sha256}


def decoder_stages(guidance: str, evaluate: EvaluateJob) -> list[str]:
    """Decoders for a guidance: the chosen one first, then the other where a swap is measured."""
    chosen = evaluate.decoder_for_samples
    other = "decoder" if chosen == "finetune" else "finetune"
    return [chosen, other] if guidance in SWAPPED else [chosen]


def read_chunk(uri: str) -> dict[str, torch.Tensor]:
    """Images of one chunk by decoder stage."""
    with np.load(io.BytesIO(files.read_bytes(uri))) as data:
        return {name: torch.from_numpy(data[name]) for name in data.files}
