"""ImageNet-1k recipes: the paper, RAE's and RAEv2's second stages on the same latents, 512 px.

The tokenizer's sections are in `drorae.recipes.imagenet_tokenizer`. All recipes at 256 px share
them and the latents, so that the stages `shard` to `latents` are built once for all.
"""

import dataclasses
from typing import Any

from drorae.config import Compute
from drorae.data.jobs import LatentJob
from drorae.evaluation.job import EvaluateJob, ReportJob
from drorae.models.dit_config import DiTConfig, dit_preset
from drorae.recipes.full import FullJob
from drorae.recipes.imagenet_tokenizer import ORDER, TRAIN_IMAGES, imagenet_sections
from drorae.training.jobs import DiffusionStage, OptimConfig

__all__ = ["PAPER_EPOCH", "imagenet256", "imagenet256_rae", "imagenet256_raev2", "imagenet512"]

PAPER_BATCH, RAE_BATCH = 256, 1024
PAPER_EPOCH = TRAIN_IMAGES // PAPER_BATCH
"""Steps: 5,004 whole batches."""
RAE_EPOCH = TRAIN_IMAGES // RAE_BATCH
"""Steps: 1,251 whole batches."""

# torch-fidelity's own name of its converted weights.
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"


def imagenet256() -> FullJob:
    """The paper: DRoRAE on ImageNet-1k at 256 px, DiT-DH-XL for 80 epochs.

    Command: `drorae run --recipe imagenet256 --set shard.source=TRAIN --set shard.val_source=VAL`.
    Files of your own: the two image folders (one folder a class), DINO ViT-S/8
    (`dino_vit_small_patch8_224.pth`) and Inception-v3 for FID
    (`evaluate.inception_weights_path`), both in the working directory unless set.
    Expected (arXiv:2605.10780, Tables 1 and 4): rFID 0.57 of the decoder, 0.47 with the fusion,
    0.29 after finetune; gFID at 80 epochs 2.46 unguided and 1.70 with AutoGuidance 1.5 before
    finetune, 2.68 and 1.65 after.
    Open in the paper and decided here: steps of the sampler (250 Euler steps of velocity flow
    matching; RAE's 50 points: `--set evaluate.num_grid_points=50`), epochs of the weak model (RAE:
    14), EMA .9995, gradient clipping 1 and the random flip (RAE).
    Time: see `drorae plan --recipe imagenet256`. Never run at full size here.
    """
    return FullJob(
        recipe="imagenet256",
        **imagenet_sections(256, "drorae"),
        **_shared(num_gpus=8),
        diffusion=_paper_stage(dit_preset("DiT-DH-XL"), num_epochs=80),
        guide=_paper_stage(dit_preset("DiT-DH-S"), num_epochs=14),
        evaluate=_evaluate(
            guidances=("unguided", "cfg", "autoguidance"),
            num_grid_points=251,
            cfg_scale=1.5,
            autoguidance_scale=1.5,
        ),
        report=ReportJob(title="DRoRAE, ImageNet 256"),
    )


def imagenet256_rae() -> FullJob:
    """RAE's second stage on the same latents: batch 1024, 80 of its 800 epochs.

    Command: as `imagenet256`; what that recipe has built up to the latents is reused.
    RAE's own tokenizer instead: import its files, then add `--set fusion.model.kind=rae
    --set decoder.released=sha256:HEX --set decoder.released_stats=sha256:HEX
    --set latents.stats=imported`.
    Source: the configuration of DiTDH-XL in RAE's code (arXiv:2510.11690): 2e-4 for 40 epochs, then
    linear to 2e-5 at epoch 800, (.9, .95), clipping 1, EMA .9995, TF32, 50 grid points,
    AutoGuidance 1.42 with DiT-DH-S of 14 epochs.
    Expected: no number is published for DRoRAE's latents under this recipe. RAE's latents: gFID
    2.16 unguided at 80 epochs; 1.51 and 1.13 with AutoGuidance at 800
    (`--set diffusion.num_steps=1000800`).
    Time: see `drorae plan --recipe imagenet256_rae`. Never run at full size here.
    """
    return FullJob(
        recipe="imagenet256_rae",
        **imagenet_sections(256, "drorae"),
        **_shared(num_gpus=32),
        diffusion=_rae_stage(dit_preset("DiT-DH-XL"), num_epochs=80),
        guide=_rae_stage(dit_preset("DiT-DH-S"), num_epochs=14),
        evaluate=_evaluate(
            guidances=("unguided", "autoguidance"),
            num_grid_points=50,
            autoguidance_scale=1.42,
        ),
        report=ReportJob(title="RAE's second stage on DRoRAE latents, ImageNet 256"),
    )


def imagenet256_raev2() -> FullJob:
    """RAEv2's second stage on the same latents: clean predictions and internal guidance.

    Command: as `imagenet256`; what that recipe has built up to the latents is reused, and no guide
    is trained.
    Source: RAEv2 (arXiv:2605.18324) and HiRAE's account of it: the network gives the clean latents,
    a second head after block 8 does too, both take the velocity error with weight 1; 2e-4 for 25
    epochs, then to 2e-5 at epoch 50 of 80; Euler from 1 to 0; internal guidance 1.78 in [.1, 1].
    Not taken over: its encoder (DINOv3-L), class and time tokens in context, a trunk of 1440
    channels, and Muon, in whose place AdamW (.9, .95) stands.
    Expected: no number is published for these latents. RAEv2's own (7 layers, 80 epochs): gFID 1.65
    unguided, 1.06 with internal guidance.
    Time: see `drorae plan --recipe imagenet256_raev2`. Never run at full size here.
    """
    return FullJob(
        recipe="imagenet256_raev2",
        **imagenet_sections(256, "drorae"),
        **_shared(num_gpus=32),
        diffusion=_raev2_stage(dit_preset("DiT-DH-XL"), num_epochs=80),
        guide=_rae_stage(dit_preset("DiT-DH-S"), num_epochs=14),
        evaluate=_evaluate(
            guidances=("unguided", "internal"),
            num_grid_points=50,
            grid_end="zero",
            internal_scale=1.78,
            internal_interval=(0.1, 1.0),
        ),
        report=ReportJob(title="RAEv2's second stage on DRoRAE latents, ImageNet 256"),
    )


def imagenet512() -> FullJob:
    """ImageNet-1k at 512 px: the paper's tokenizer on 32 x 32 tokens, RAE's second stage.

    Command: as `imagenet256`, with `--recipe imagenet512`.
    Source: the paper trains at 256 px only; the tokenizer repeats its recipe on 448 px inputs. RAE
    (arXiv:2510.11690) at 512 px: DiT-DH-XL for 400 epochs at batch 1024, AutoGuidance 1.5 with
    DiT-DH-S of 20 epochs.
    Expected: no number is published for DRoRAE at 512 px. RAE: gFID 1.13 with AutoGuidance.
    Time: see `drorae plan --recipe imagenet512`. Never run at full size here.
    """
    return FullJob(
        recipe="imagenet512",
        **imagenet_sections(512, "drorae"),
        **_shared(num_gpus=128, batch_images=64),
        diffusion=_rae_stage(dit_preset("DiT-DH-XL", input_size=32), num_epochs=400),
        guide=_rae_stage(dit_preset("DiT-DH-S", input_size=32), num_epochs=20),
        evaluate=_evaluate(
            guidances=("unguided", "autoguidance"),
            num_grid_points=50,
            autoguidance_scale=1.5,
            batch_images=64,
            num_grid_images=1,
        ),
        report=ReportJob(title="DRoRAE, ImageNet 512"),
    )


def _shared(*, num_gpus: int, batch_images: int = 256) -> dict[str, Any]:
    """Latents of both views, since RAE's second stage flips at random, and GPUs of 80 GB.

    As many as a batch needs, by the memory table of `drorae plan`. No result depends on
    their number: `--set compute.num_workers=N`.
    """
    return {
        "latents": LatentJob(batch_images=batch_images, flip=True, precision="tf32"),
        "compute": Compute(
            num_workers=num_gpus,
            threads_per_worker=8,
            use_gpu=True,
            data_actors=8,  # for `shard`; networks run on all GPUs of the cluster
            parallel_stages=1,  # a stage takes all GPUs
            log_every_steps=50,
            save_every_steps=2500,
            save_every_s=1800.0,
            collective_timeout_s=1800.0,
        ),
    }


def _evaluate(**settings: Any) -> EvaluateJob:
    """ADM protocol: all 50,000 validation images, 50,000 balanced samples, Inception-v3."""
    return EvaluateJob(
        **{
            "num_val_images": 0,
            "num_samples": 50_000,
            "feature_extractor": "inception-v3",
            "inception_weights_path": INCEPTION,
            "kid_subset": 1000,
            "batch_images": 250,
            "chunk_samples": 1000,
            "precision": "tf32",  # RAE's
            "num_diagnostic_images": 256,
            **settings,
        }
    )


def _paper_stage(model: DiTConfig, num_epochs: int) -> DiffusionStage:
    """Section 2.2: batch 256, constant 1e-4, (.9, .999), no decay; the rest is RAE's."""
    return DiffusionStage(
        model=model,
        num_steps=num_epochs * PAPER_EPOCH,
        batch_images=PAPER_BATCH,
        order=ORDER,
        optim=OptimConfig(
            lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, schedule="constant", clip_norm=1.0
        ),
        ema_decay=0.9995,
        precision="tf32",
    )


def _rae_stage(model: DiTConfig, num_epochs: int) -> DiffusionStage:
    """RAE: batch 1024, 2e-4 held for 40 epochs, then linear to 2e-5 at epoch 800."""
    return DiffusionStage(
        model=model,
        num_steps=num_epochs * RAE_EPOCH,
        batch_images=RAE_BATCH,
        order=ORDER,
        optim=_rae_optim(hold_epochs=40, end_epochs=800),
        ema_decay=0.9995,
        precision="tf32",
    )


def _raev2_stage(model: DiTConfig, num_epochs: int) -> DiffusionStage:
    """RAEv2: clean predictions with a base head; 2e-4 for 25 epochs, 2e-5 from epoch 50 on."""
    return dataclasses.replace(
        _rae_stage(dataclasses.replace(model, base_head_after=8), num_epochs),
        prediction="clean",
        base_weight=1.0,
        optim=_rae_optim(hold_epochs=25, end_epochs=50),
    )


def _rae_optim(hold_epochs: int, end_epochs: int) -> OptimConfig:
    return OptimConfig(
        lr=2e-4,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        schedule="linear",
        hold_steps=hold_epochs * RAE_EPOCH,
        schedule_steps=end_epochs * RAE_EPOCH,
        final_lr=2e-5,
        clip_norm=1.0,
    )
