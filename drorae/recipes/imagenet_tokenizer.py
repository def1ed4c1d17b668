"""The tokenizer's sections for ImageNet-1k at 256 and 512 px: the paper's recipe and RAE's own.

Sources: DRoRAE arXiv:2605.10780, section 2.2 and appendix; what it leaves open is taken from RAE
(arXiv:2510.11690 and the configuration `DINOv2-B_decXL` of its code). Epochs are whole batches of
1,281,167 images. Never run at full size here.
"""

from typing import Any, Literal, TypedDict

from drorae.data.jobs import OrderConfig, ShardJob
from drorae.models.decoder_config import decoder_preset
from drorae.models.encoder_config import EncoderConfig
from drorae.models.fusion_config import FusionConfig
from drorae.training.jobs import (
    AdversarialConfig,
    DecoderStage,
    FinetuneStage,
    FusionStage,
    OptimConfig,
    TokenizerTraining,
)

__all__ = ["ORDER", "TRAIN_IMAGES", "TokenizerSections", "imagenet_sections"]

TRAIN_IMAGES = 1_281_167
"""Training images of ImageNet-1k (ILSVRC 2012)."""

ORDER = OrderConfig(streams=64, window_shards=4)
"""Streams divide every batch size of the recipes and up to 64 nodes. With four of 1,252 shards a
window, a batch of 256 has images of 175 shards (a full permutation: 232)."""

WARMUP_EPOCHS = 1
"""RAE configuration: linear warm-up of one epoch; the paper states none."""

CRITIC_LEAD_EPOCHS = 2
"""Epochs in which only the discriminator learns. RAE: it starts at 6, the generator's term at 8."""

GAN_WEIGHT = 0.75
"""RAE configuration; the paper says "adaptive" only."""


class TokenizerSections(TypedDict):
    """The sections of a `FullJob` that make a tokenizer."""

    shard: ShardJob
    encoder: EncoderConfig
    decoder: DecoderStage
    fusion: FusionStage
    finetune: FinetuneStage


def imagenet_sections(
    image_px: Literal[256, 512] = 256, source: Literal["drorae", "rae"] = "drorae"
) -> TokenizerSections:
    """Sections `shard`, `encoder`, `decoder`, `fusion` and `finetune` of a `FullJob`.

    Args:
        image_px: Side of the images; the encoder sees 7/8 of it.
        source: `drorae`: the paper's three phases. `rae`: RAE's stage 1 for the decoder and no
            fusion; `finetune` stays the paper's, since the graph has that stage in any case.
    """
    phases = _rae() if source == "rae" else _drorae()
    # RAE: 224 px for images of 256, 448 for 512.
    encoder = EncoderConfig(
        source="facebook/dinov2-with-registers-base",
        input_px=image_px * 7 // 8,
        patch_px=14,
        width=768,
        depth=12,
    )
    # The paper prints 335M for a shape that has 682M; its baseline is RAE's ViT-XL, 415M.
    decoder = decoder_preset("ViT-XL", latent_channels=encoder.width, grid=encoder.grid)
    fusion = FusionConfig(kind="rae") if source == "rae" else FusionConfig()
    return {
        "shard": _shard(image_px),
        "encoder": encoder,
        "decoder": DecoderStage(model=decoder, train=phases["decoder"]),
        "fusion": FusionStage(model=fusion, train=phases["fusion"]),
        "finetune": FinetuneStage(train=phases["finetune"]),
    }


def _shard(image_px: int) -> ShardJob:
    """All images of both splits, whatever their shape; point `source` at the two folders."""
    return ShardJob(
        source="imagenet/train",
        val_source="imagenet/val",
        resolution_px=image_px,
        crop="center",  # ADM, the evaluation protocol of RAE and of the paper
        pictures="source",
        view_px=image_px * 3 // 2,  # RAE: shorter side to int(1.5 * size), then a random crop
        rows_per_shard=1024,  # about 1,251 shards of 110 MB
        min_side_px=1,
        max_aspect_ratio=1000.0,
        duplicates="keep",
    )


def _drorae() -> dict[str, TokenizerTraining]:
    """Section 2.2: 100, 100 and 20 epochs at batch 256; GAN from step 30,000, 10,000, 30,000."""
    return {
        "decoder": _drorae_phase(num_epochs=100, gan_start_step=30_000),
        "fusion": _drorae_phase(num_epochs=100, gan_start_step=10_000),
        "finetune": _drorae_phase(num_epochs=20, gan_start_step=30_000),
    }


def _drorae_phase(num_epochs: int, gan_start_step: int) -> TokenizerTraining:
    batch_images = 256  # section 2.2
    epoch = TRAIN_IMAGES // batch_images  # 5,004 steps
    return TokenizerTraining(
        num_steps=num_epochs * epoch,
        batch_images=batch_images,
        optim=OptimConfig(
            lr=1e-4,  # section 2.2: AdamW 1e-4, (.5, .9), 0.05, cosine in every phase
            betas=(0.5, 0.9),
            weight_decay=0.05,
            schedule="cosine",
            warmup_steps=WARMUP_EPOCHS * epoch,
            final_lr=0.0,  # "cosine" without a floor
            clip_norm=0.0,  # RAE: no clipping
        ),
        adversarial=AdversarialConfig(
            weight=GAN_WEIGHT,
            start_step=gan_start_step,
            # "Trained jointly in each phase": as long before as in RAE, or from the start.
            learn_from_step=max(0, gan_start_step - CRITIC_LEAD_EPOCHS * epoch),
            optim=_critic_optim(epoch),
            schedule_span="phase",
        ),
        **_shared(),
    )


def _rae() -> dict[str, TokenizerTraining]:
    """RAE's stage 1: 16 epochs at batch 512. Its fusion has nothing to train."""
    batch_images = 512
    epoch = TRAIN_IMAGES // batch_images  # 2,502 steps
    decoder = TokenizerTraining(
        num_steps=16 * epoch,
        batch_images=batch_images,
        optim=OptimConfig(
            lr=2e-4,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            schedule="cosine",
            warmup_steps=WARMUP_EPOCHS * epoch,
            final_lr=2e-5,
            clip_norm=0.0,
        ),
        adversarial=AdversarialConfig(
            weight=GAN_WEIGHT,
            start_epoch=8.0,
            learn_from_epoch=6.0,
            optim=_critic_optim(epoch),
            schedule_span="phase",
        ),
        **_shared(),
    )
    return {"decoder": decoder, "fusion": decoder, "finetune": _drorae()["finetune"]}


def _critic_optim(epoch: int) -> OptimConfig:
    """The discriminator's optimiser, RAE's in both recipes: the paper gives none."""
    return OptimConfig(
        lr=2e-4,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        schedule="cosine",
        warmup_steps=WARMUP_EPOCHS * epoch,
        final_lr=2e-5,
    )


def _shared() -> dict[str, Any]:
    """What RAE states, the paper leaves open, and both recipes therefore share."""
    return {
        "l1_weight": 1.0,
        "lpips_weight": 1.0,  # Eq. 6, lambda_p; RAE: 1.0 from the first step
        "lpips_net": "vgg",
        "noise_tau": 0.8,  # the released "n08" decoders; HiRAE's DRoRAE comparator: 0.8 in all
        "noise_kind": "uniform",
        "ema_decay": 0.9978,
        "view": "random_crop",
        "hidden_states": "none",
        # RAE leaves float32 or bfloat16 to the caller; losses and master weights are float32.
        "precision": "bfloat16",
        "order": ORDER,
        "eval_every_steps": 2500,  # RAE: a grid of samples every 2,500 steps
    }
