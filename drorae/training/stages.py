"""Entry functions of the training stages: read inputs, build modules, run the loop, write weights.

`run_*` is what the stage table names and runs in the stage's driver process; `_train_*` is what
every Ray Train worker runs. Neither loop nor module knows which of them called it.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from drorae.checkpoint import TrainingCheckpoints, load_weights, weights_bytes
from drorae.config import from_json, to_json
from drorae.data.assets import asset_path
from drorae.data.hidden_states import HiddenStates, check_kept, hidden_cache_path, hidden_in_step
from drorae.data.images import ImageShards
from drorae.data.latent_shards import LatentShards
from drorae.data.loaders import Delivery, crop_batches, latent_batches, tokenizer_batches
from drorae.data.random_crops import RandomCrops
from drorae.data.shard_cache import node_cache
from drorae.losses.perceptual import load_perceptual
from drorae.models.decoder import Decoder, DecoderConfig
from drorae.models.discriminator import build_discriminator
from drorae.models.dit import DiT
from drorae.models.encoder import Encoder, EncoderConfig, build_encoder
from drorae.models.fusion import FusionConfig, build_fusion
from drorae.models.fusion_config import UNTRAINED_KINDS, blocks_read
from drorae.store import files
from drorae.store.context import StageContext, StageResult
from drorae.tracking import NullTracker, Tracker, connect
from drorae.training.critic import Critic
from drorae.training.diffusion import DiffusionBatch, train_diffusion
from drorae.training.ema import ema_state_dict
from drorae.training.evaluators import Evaluator, reconstruction_evaluator
from drorae.training.jobs import (
    DecoderStage,
    DiffusionStage,
    FinetuneStage,
    FusionStage,
    TokenizerTraining,
)
from drorae.training.loop import LoopTools, TrainReport
from drorae.training.newest import Newest
from drorae.training.released import commit_released
from drorae.training.schedule import in_steps, schedule_record
from drorae.training.tokenizer import (
    TokenizerBatch,
    TokenizerPhase,
    decoder_phase,
    fusion_phase,
    train_tokenizer,
)
from drorae.training.watchdog import unhurried, watched
from drorae.training.world import World

__all__ = [
    "run_control",
    "run_decoder",
    "run_diffusion",
    "run_finetune",
    "run_fusion",
    "run_guide",
]

RAE = FusionConfig(kind="rae")


def run_decoder(
    ctx: StageContext, *, seed: int, encoder: EncoderConfig, decoder: DecoderStage
) -> StageResult:
    """Train RAE's decoder on last-layer latents, or import a released one."""
    if decoder.released:
        return commit_released(ctx, encoder, decoder)
    sections = {"seed": seed, "encoder": encoder, "decoder": decoder}
    return _on_ray(ctx, _train_decoder, sections)


def run_fusion(
    ctx: StageContext, *, seed: int, encoder: EncoderConfig, fusion: FusionStage
) -> StageResult:
    """Train the fusion through the frozen decoder; kinds without parameters are only recorded."""
    if fusion.model.kind in UNTRAINED_KINDS:
        return _record_fusion(ctx, encoder, fusion)
    return _on_ray(ctx, _train_fusion, {"seed": seed, "encoder": encoder, "fusion": fusion})


def run_finetune(
    ctx: StageContext, *, seed: int, encoder: EncoderConfig, finetune: FinetuneStage
) -> StageResult:
    """Train the decoder on from its last weights, on the frozen fusion's latents."""
    sections = {"seed": seed, "encoder": encoder, "job": finetune.train, "use_fusion": True}
    return _on_ray(ctx, _train_decoder_on, sections)


def run_control(
    ctx: StageContext, *, seed: int, encoder: EncoderConfig, control: FinetuneStage
) -> StageResult:
    """Train the decoder on from its last weights, on the same last-layer latents: the baseline."""
    sections = {"seed": seed, "encoder": encoder, "job": control.train, "use_fusion": False}
    return _on_ray(ctx, _train_decoder_on, sections)


def run_diffusion(ctx: StageContext, *, seed: int, diffusion: DiffusionStage) -> StageResult:
    """Train the generator on cached latents."""
    return _on_ray(ctx, _train_dit, {"seed": seed, "job": diffusion})


def run_guide(ctx: StageContext, *, seed: int, guide: DiffusionStage) -> StageResult:
    """Train the weak generator that AutoGuidance pushes away from."""
    return _on_ray(ctx, _train_dit, {"seed": seed, "job": guide})


def _on_ray(ctx: StageContext, train: Callable[..., StageResult], sections: Any) -> StageResult:
    # The loops themselves need no Ray.
    from drorae.training.ray_worker import check_worker_counts, train_on_ray

    job = next(job for job in map(_job_of, sections.values()) if job is not None)
    check_worker_counts(ctx.compute, job.batch_images)
    return train_on_ray(ctx, train, sections)


def _job_of(section: Any) -> TokenizerTraining | DiffusionStage | None:
    """The training that a section describes, if it describes one."""
    job = getattr(section, "train", section)
    return job if isinstance(job, TokenizerTraining | DiffusionStage) else None


def _train_decoder(
    ctx: StageContext, world: World, *, seed: int, encoder: EncoderConfig, decoder: DecoderStage
) -> StageResult:
    torch.manual_seed(seed)
    frozen = build_encoder(encoder, asset_path)
    network = Decoder(decoder.model)
    fusion = _build_fusion(RAE, frozen)
    phase = decoder_phase(ctx.stage, fusion, network, world, ctx.compute)
    report, schedule = _run_phase(ctx, world, seed, frozen, decoder.train, phase, RAE)
    settings = {"encoder": to_json(encoder), "model": to_json(decoder.model)}
    return _write(ctx, world, "decoder", report, settings | {"schedule": schedule})


def _train_fusion(
    ctx: StageContext, world: World, *, seed: int, encoder: EncoderConfig, fusion: FusionStage
) -> StageResult:
    torch.manual_seed(seed)
    frozen = build_encoder(encoder, asset_path)
    network = _build_fusion(fusion.model, frozen)
    phase = fusion_phase(network, load_decoder(ctx), world, ctx.compute)
    report, schedule = _run_phase(ctx, world, seed, frozen, fusion.train, phase, fusion.model)
    settings = {"encoder": to_json(encoder), "model": to_json(fusion.model)}
    return _write(ctx, world, "fusion", report, settings | {"schedule": schedule})


def _record_fusion(ctx: StageContext, encoder: EncoderConfig, fusion: FusionStage) -> StageResult:
    """Output of a fusion that has no parameters: its configuration and an empty weights file."""
    settings = {"encoder": to_json(encoder), "model": to_json(fusion.model)}
    entries = [
        ctx.put_bytes("fusion.safetensors", weights_bytes({})),
        ctx.put_json("config.json", settings),
        ctx.put_bytes("train_log.jsonl", b""),
    ]
    return StageResult(files=entries)


def _train_decoder_on(
    ctx: StageContext,
    world: World,
    *,
    seed: int,
    encoder: EncoderConfig,
    job: TokenizerTraining,
    use_fusion: bool,
) -> StageResult:
    torch.manual_seed(seed)
    frozen = build_encoder(encoder, asset_path)
    kind = _fusion_config(ctx) if use_fusion else RAE
    fusion = _build_fusion(kind, frozen)
    if use_fusion:
        fusion.load_state_dict(load_weights(str(ctx.inputs["fusion"].local("fusion.safetensors"))))
    network = load_decoder(ctx)
    phase = decoder_phase(ctx.stage, fusion, network, world, ctx.compute)
    report, schedule = _run_phase(ctx, world, seed, frozen, job, phase, kind)
    settings = {"encoder": to_json(encoder), "model": to_json(network.config)}
    return _write(ctx, world, "decoder", report, settings | {"schedule": schedule})


def _train_dit(ctx: StageContext, world: World, *, seed: int, job: DiffusionStage) -> StageResult:
    torch.manual_seed(seed)
    world.local_batch(job.batch_images, f"{ctx.stage}.batch_images", ctx.compute.accumulate_steps)
    latents = LatentShards(ctx.inputs["latents"], cache=node_cache(ctx.compute))
    model = DiT(job.model)
    # A setting of the process, which trains this stage only.
    torch.set_float32_matmul_precision("high" if job.precision == "tf32" else "highest")

    def batches(start: int) -> Iterator[DiffusionBatch]:
        return latent_batches(latents, start_step=start, **_delivery(ctx, job, world, seed))

    with _Tools(ctx, world) as tools:
        report = train_diffusion(
            job, model, watched(batches), tools, stats=latents.stats, stage=ctx.stage, seed=seed
        )
    settings = {"model": to_json(job.model), "times": to_json(job.times)}
    settings |= {"prediction": job.prediction, "latents": ctx.inputs["latents"].key}
    return _write(ctx, world, "dit", report, settings)


def load_decoder(ctx: StageContext) -> Decoder:
    """The `decoder` stage's averaged weights in a network of its size."""
    output = ctx.inputs["decoder"]
    network = Decoder(from_json(DecoderConfig, output.read_json("config.json")["model"]))
    network.load_state_dict(load_weights(str(output.local("decoder.safetensors"))))
    return network


def _build_fusion(config: FusionConfig, encoder: Encoder) -> nn.Module:
    return build_fusion(
        config, encoder.num_layers, encoder.width, layer_norm_eps=encoder.layer_norm_eps
    )


def _fusion_config(ctx: StageContext) -> FusionConfig:
    return from_json(FusionConfig, ctx.inputs["fusion"].read_json("config.json")["model"])


class _Tools:
    """Context manager around a loop: tracker, checkpoints, progress.

    At the end the last checkpoint is written out and the tracker closed.
    """

    def __init__(
        self, ctx: StageContext, world: World, evaluators: Sequence[Evaluator] = ()
    ) -> None:
        self._ctx, self._world, self._evaluators = ctx, world, evaluators
        self._tracker: Tracker = connect(ctx) if world.is_main else NullTracker()
        self._progress = Newest(lambda done, total: ctx.progress(done, total, "images"))
        compute = ctx.compute
        self._checkpoints = TrainingCheckpoints(
            work_uri=ctx.work_uri,
            every_steps=compute.save_every_steps,
            every_s=compute.save_every_s,
            keep=compute.keep_checkpoints,
            keep_every_steps=compute.keep_every_steps,
            timeout_s=compute.collective_timeout_s,
        )

    def __enter__(self) -> LoopTools:
        return LoopTools(
            world=self._world,
            compute=self._ctx.compute,
            checkpoints=self._checkpoints,
            log=self._tracker.log,
            catch_up=self._tracker.catch_up,
            progress=self._progress,
            evaluators=[partial(evaluate, self._tracker) for evaluate in self._evaluators],
        )

    def __exit__(self, *exc: object) -> None:
        # After an error too: the others wait for it, and its own loop has not been left.
        with unhurried("the last checkpoint and the last points"):
            self._checkpoints.wait()
            self._tracker.close()
            self._progress.close()


def _run_phase(
    ctx: StageContext,
    world: World,
    seed: int,
    encoder: Encoder,
    job: TokenizerTraining,
    phase: TokenizerPhase,
    fusion: FusionConfig,
) -> tuple[TrainReport, dict[str, float]]:
    """Give the loop its batches, losses and tools; returns its report and the schedule."""
    world.local_batch(job.batch_images, f"{ctx.stage}.batch_images", ctx.compute.accumulate_steps)
    # A setting of the process, which trains this stage only.
    torch.set_float32_matmul_precision("highest" if job.precision == "float32" else "high")
    encoder = encoder.to(world.device)
    train, held_out = (
        _hidden_states(ctx, world, split, encoder, job) for split in ("train", "val")
    )
    job = in_steps(job, len(train))
    train.fill(rank=world.rank, world_size=world.world_size, on_progress=_fill_progress(ctx, world))
    show = reconstruction_evaluator(phase, held_out, world)
    lpips = None
    if job.lpips_weight:
        lpips = load_perceptual(asset_path(f"lpips-{job.lpips_net}")).to(world.device)
    blocks = blocks_read(fusion, encoder.config.block_numbers)
    critic = _build_critic(ctx, job, world, seed)
    with _Tools(ctx, world, [show]) as tools:
        report = train_tokenizer(
            job,
            phase,
            watched(_tokenizer_batches(ctx, job, world, seed, train)),
            lpips,
            tools,
            seed=seed,
            critic=critic,
            see=hidden_in_step(encoder, blocks),
        )
    return report, schedule_record(job, len(train))


def _tokenizer_batches(
    ctx: StageContext, job: TokenizerTraining, world: World, seed: int, train: HiddenStates
) -> Callable[[int], Iterator[TokenizerBatch]]:
    """Batches from a step on: random crops, or the stored squares with their hidden states."""
    delivery = _delivery(ctx, job, world, seed)
    if job.view == "random_crop":
        compute, shard = ctx.compute, ctx.inputs["shard"]
        cache, threads = node_cache(compute), compute.loader_threads
        crops = RandomCrops(shard, seed=seed, cache=cache, threads=threads)
        return lambda start: crop_batches(crops, start_step=start, **delivery)
    kept = train if job.hidden_states != "none" else None
    return lambda start: tokenizer_batches(train.shards, kept, start_step=start, **delivery)


def _hidden_states(
    ctx: StageContext, world: World, split: str, encoder: Encoder, job: TokenizerTraining
) -> HiddenStates:
    cache, threads = node_cache(ctx.compute), ctx.compute.loader_threads
    images = ImageShards(ctx.inputs["shard"], split, cache=cache, threads=threads)
    is_shared = world.is_on_one_machine or bool(ctx.compute.cache_path)
    check_kept(job.hidden_states, len(images), encoder.config, is_shared=is_shared)
    return HiddenStates(images, encoder, job.hidden_states, hidden_cache_path(ctx))


def _fill_progress(ctx: StageContext, world: World) -> Callable[[int, int], None] | None:
    if not world.is_main:
        return None
    message = "encoding once; kept for later stages"
    return lambda done, total: ctx.progress(done, total, "blocks", message=message)


def _delivery(
    ctx: StageContext, job: TokenizerTraining | DiffusionStage, world: World, seed: int
) -> Delivery:
    """What fixes this rank's samples in every step, and how they are made ready."""
    return {
        "seed": seed,
        "num_steps": job.num_steps,
        "global_batch": job.batch_images,
        "order": job.order,
        "rank": world.rank,
        "world_size": world.world_size,
        "threads": ctx.compute.loader_threads,
        "pin": world.device.type == "cuda",
    }


def _build_critic(
    ctx: StageContext, job: TokenizerTraining, world: World, seed: int
) -> Critic | None:
    if job.adversarial.weight == 0:
        return None
    judge = build_discriminator(job.adversarial.discriminator, asset_path)
    return Critic(
        judge,
        job.adversarial,
        num_steps=job.num_steps,
        world=world,
        seed=seed,
        on_non_finite=ctx.compute.on_non_finite,
    )


def _write(
    ctx: StageContext,
    world: World,
    name: str,
    report: TrainReport,
    settings: dict[str, Any],
) -> StageResult:
    """Rank 0 writes averaged and online weights, the configuration and the training log."""
    if not world.is_main:
        return StageResult(files=[])
    average = ema_state_dict(report.ema, report.weights)
    log = b"".join(files.encode_log_row(row) for row in report.history)
    entries = [
        ctx.put_bytes(f"{name}.safetensors", weights_bytes(average)),
        ctx.put_bytes(f"{name}_online.safetensors", weights_bytes(report.weights)),
        ctx.put_json("config.json", settings),
        ctx.put_bytes("train_log.jsonl", log),
    ]
    schedule = {f"schedule/{k}": v for k, v in settings.get("schedule", {}).items()}
    return StageResult(files=entries, metrics=_final_metrics(report.history) | schedule)


def _final_metrics(history: list[dict[str, float]]) -> dict[str, float]:
    """The last value of every logged quantity."""
    last: dict[str, float] = {}
    for row in history:
        last |= {name: value for name, value in row.items() if name != "step"}
    return last
