"""The cifar10 recipe: all 50,000 photos, small networks, one GPU or a patient CPU."""

from drorae.config import Compute
from drorae.data.jobs import LatentJob, ShardJob
from drorae.evaluation.job import EvaluateJob, ReportJob
from drorae.models.dit_config import DiTConfig
from drorae.models.fusion_config import FusionConfig
from drorae.recipes.cifar10_parts import ENCODER, IMAGE_PX, decoder, dit, optim
from drorae.recipes.full import FullJob
from drorae.training.jobs import (
    AdversarialConfig,
    DecoderStage,
    DiffusionStage,
    FinetuneStage,
    FusionStage,
    TokenizerTraining,
)

__all__ = ["cifar10"]

TOKENIZER_BATCH, GENERATOR_BATCH = 128, 128
EPOCH = 50_000 // TOKENIZER_BATCH  # 390 steps


def cifar10() -> FullJob:
    """All of CIFAR-10: the smallest experiment whose samples should look like pictures.

    Command: `drorae assets fetch smoke`, then `drorae run --recipe cifar10`; on a GPU add
    `--set compute.use_gpu=true`.
    Data: 50,000 training and 10,000 test photos of 32 px, shown to the encoder at 112 px.
    Encoder: smoke's asset, a DINOv2 ViT-S/14 fine-tuned for saliency, which costs semantics.
    With a discriminator: `--set decoder.train.adversarial.weight=0.75
    --set decoder.train.adversarial.discriminator.source=FILE`, FILE being DINO's ViT-S/8; likewise
    for fusion and finetune.
    Expected time, from the FLOPs of `drorae plan --recipe cifar10 --cost`, not measured: hours on
    one GPU, days on a CPU. Expected result: better than smoke in every number; none is published
    for this setting. Never run at full size here.
    """
    return FullJob(
        recipe="cifar10",
        seed=0,
        shard=ShardJob(source="asset:cifar10", resolution_px=IMAGE_PX, rows_per_shard=5000),
        encoder=ENCODER,
        decoder=DecoderStage(
            model=decoder(width=256, layers=8, heads=4),
            train=_tokenizer(num_epochs=30, lr=5e-4),
        ),
        fusion=FusionStage(
            model=FusionConfig(expert_hidden=768), train=_tokenizer(num_epochs=15, lr=5e-4)
        ),
        finetune=FinetuneStage(train=_tokenizer(num_epochs=15, lr=2e-4)),
        latents=LatentJob(batch_images=128, flip=True),
        diffusion=_generator(
            dit(hidden_size=(256, 512), depth=(8, 2), num_heads=(4, 8)), num_steps=40_000
        ),
        guide=_generator(
            dit(hidden_size=(128, 512), depth=(4, 2), num_heads=(2, 8)), num_steps=5_000
        ),
        evaluate=EvaluateJob(
            num_val_images=0,
            num_samples=10_000,
            feature_px=64,
            kid_subset=1000,
            batch_images=250,
            chunk_samples=500,
            precision="tf32",
            lpips_net="alex",
        ),
        report=ReportJob(title="DRoRAE, CIFAR-10"),
        compute=Compute(threads_per_worker=2, log_every_steps=50),
    )


def _tokenizer(num_epochs: int, lr: float) -> TokenizerTraining:
    """The paper's ratio of phases, and the discriminator in the second half."""
    num_steps = num_epochs * EPOCH
    return TokenizerTraining(
        num_steps=num_steps,
        batch_images=TOKENIZER_BATCH,
        optim=optim(lr, final_lr=lr / 10, warmup_steps=EPOCH),
        adversarial=AdversarialConfig(
            weight=0.0,  # needs a file that no asset gives
            start_step=num_steps // 2,
            learn_from_step=num_steps * 3 // 8,  # as RAE: epochs 6 and 8 of 16
        ),
        lpips_net="alex",
        ema_decay=0.9978,
        eval_every_steps=1000,
    )


def _generator(model: DiTConfig, num_steps: int) -> DiffusionStage:
    """DiT-DH whose head is wider than the latent's 384 channels, as RAE found necessary."""
    return DiffusionStage(
        model=model,
        num_steps=num_steps,
        batch_images=GENERATOR_BATCH,
        optim=optim(4e-4, final_lr=4e-5, warmup_steps=500),
        ema_decay=0.999,
        precision="tf32",
    )
