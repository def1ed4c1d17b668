"""The cost of a whole configuration: networks, stages, storage, and what was assumed."""

from collections.abc import Collection
from dataclasses import dataclass

from drorae.cost.count import NetworkCost
from drorae.cost.networks import (
    count_decoder,
    count_discriminator,
    count_dit,
    count_encoder,
    count_fusion,
    count_perceptual,
    split_fusion,
)
from drorae.cost.stages import (
    Networks,
    StageCost,
    diffusion_cost,
    evaluate_cost,
    latents_cost,
    tokenizer_cost,
)
from drorae.data.jobs import ShardJob
from drorae.models.encoder_config import EncoderConfig
from drorae.models.fusion_config import FusionConfig
from drorae.recipes.full import FullJob

__all__ = ["RunCost", "Storage", "count_run"]

TOKENIZER_STAGES = ("decoder", "fusion", "finetune", "control")
IMAGENET = (1_281_167, 50_000)
KNOWN_IMAGES = {"asset:cifar10": (50_000, 10_000)}
"""Training and validation images by source; any other source is taken for ImageNet-1k."""

HALF_BYTES, FLOAT_BYTES = 2, 4

SOURCE_BYTES = 115_000
"""A training image of ImageNet: ILSVRC2012_img_train.tar has 147,897,477,120 bytes for 1,281,167
images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """What one kind of file takes."""

    what: str
    size_bytes: int
    formula: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCost:
    """Everything that `drorae plan` prints about cost."""

    networks: tuple[NetworkCost, ...]
    fusion_split: dict[str, int]
    """Parameters of the fusion: experts, hidden_norm, router, total."""
    stages: tuple[StageCost, ...]
    storage: tuple[Storage, ...]
    num_train_images: int
    num_val_images: int


def count_run(
    full: FullJob, stages: Collection[str], num_train_images: int | None = None
) -> RunCost:
    """Count a configuration.

    Args:
        full: The configuration.
        stages: Stages to count.
        num_train_images: Training images; without it those of the source, where they are known, and
            of ImageNet-1k otherwise.
    """
    train, val = KNOWN_IMAGES.get(full.shard.source, IMAGENET)
    train = num_train_images or min(train, full.shard.max_train_images or train)
    val = min(val, full.shard.max_val_images or val)
    networks = _networks(full)
    shown = [networks.encoder, networks.fusion, networks.decoder, networks.lpips]
    if _uses_critic(full):
        shown += [networks.critic_trunk, networks.critic_heads]
    shown.append(networks.diffusion)
    if "autoguidance" in full.evaluate.guidances:
        shown.append(networks.guide)
    return RunCost(
        networks=tuple(shown),
        fusion_split=split_fusion(full.fusion.model, full.encoder),
        stages=tuple(_stages(full, networks, stages, train, val)),
        storage=tuple(_storage(full, networks, train)),
        num_train_images=train,
        num_val_images=val,
    )


def _networks(full: FullJob) -> Networks:
    adversarial, image_px = full.decoder.train.adversarial, full.decoder.model.image_px
    trunk, heads = count_discriminator(adversarial.discriminator, image_px)
    return Networks(
        encoder=count_encoder(full.encoder),
        fusion=count_fusion(full.fusion.model, full.encoder),
        last_layer=count_fusion(FusionConfig(kind="rae"), full.encoder),
        decoder=count_decoder(full.decoder.model),
        lpips=count_perceptual(full.decoder.train.lpips_net, image_px),
        critic_trunk=trunk,
        critic_heads=heads,
        diffusion=count_dit("diffusion", full.diffusion.model),
        guide=count_dit("guide", full.guide.model),
    )


def _uses_critic(full: FullJob) -> bool:
    phases = (full.decoder.train, full.fusion.train, full.finetune.train)
    return any(phase.adversarial.weight > 0 for phase in phases)


def _stages(
    full: FullJob, networks: Networks, wanted: Collection[str], train: int, val: int
) -> list[StageCost]:
    workers = full.compute.num_workers
    jobs = {name: getattr(full, name).train for name in TOKENIZER_STAGES}
    if full.decoder.released:
        jobs.pop("decoder")  # imported
    costs = [
        tokenizer_cost(name, job, networks, num_train_images=train, num_workers=workers)
        for name, job in jobs.items()
    ]
    costs.append(latents_cost(full.latents, networks, train))
    costs += [
        diffusion_cost("diffusion", full.diffusion, networks.diffusion, num_workers=workers),
        diffusion_cost("guide", full.guide, networks.guide, num_workers=workers),
    ]
    photos = full.evaluate.num_val_images or val
    decoders = 4 if full.evaluate.control else 3  # rae, fusion, finetune, control
    evaluate = evaluate_cost(full.evaluate, networks, num_val_images=photos, num_decoders=decoders)
    return [cost for cost in (*costs, evaluate) if cost.stage in wanted]


def _storage(full: FullJob, networks: Networks, train: int) -> list[Storage]:
    found = [_shards(full.shard, train), _latents(full, train)]
    if any(getattr(full, name).train.hidden_states == "disk" for name in TOKENIZER_STAGES):
        found.append(_hidden_states(full.encoder, train))
    keep, trained = full.compute.keep_checkpoints, networks.diffusion.trainable
    checkpoints = Storage(
        what="checkpoints of diffusion",
        size_bytes=keep * 4 * FLOAT_BYTES * trained,
        formula=f"{keep} kept x 4 (weights, EMA, two moments) x 4 bytes x {trained:,}",
    )
    return [*found, checkpoints]


def _shards(shard: ShardJob, train: int) -> Storage:
    if shard.pictures == "source":
        return Storage(
            what="shards, source files",
            size_bytes=train * SOURCE_BYTES,
            formula=f"{train:,} x {SOURCE_BYTES:,} bytes, a photo of ImageNet; "
            "they are the source's own files",
        )
    side = shard.resolution_px
    return Storage(
        what="shards, squares",
        size_bytes=train * 3 * side * side,
        formula=f"at most {train:,} x 3 x {side} x {side} bytes, PNG takes less",
    )


def _latents(full: FullJob, train: int) -> Storage:
    width, grid = full.encoder.width, full.encoder.grid
    views = 2 if full.latents.flip else 1
    return Storage(
        what="latents",
        size_bytes=train * views * width * grid * grid * HALF_BYTES,
        formula=f"{train:,} x {width} x {grid} x {grid} x {HALF_BYTES} bytes x {views} "
        + ("views" if views > 1 else "view"),
    )


def _hidden_states(encoder: EncoderConfig, train: int) -> Storage:
    layers, grid, width = encoder.num_layers, encoder.grid, encoder.width
    return Storage(
        what="hidden states",
        size_bytes=train * layers * grid * grid * width * HALF_BYTES,
        formula=f"{train:,} x {layers} x {grid} x {grid} x {width} x {HALF_BYTES} bytes",
    )
