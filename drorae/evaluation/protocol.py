"""How the numbers were obtained, and with what they do not compare: part of `metrics.json`."""

from typing import Any

from drorae.config import to_json
from drorae.evaluation.job import EvaluateJob
from drorae.models.encoder import EncoderConfig

__all__ = ["caveats", "protocol"]

SMALL_SET = 10_000
"""Below this many images a Frechet distance is strongly biased upwards (TTUR advises 10,000 and
more)."""


def protocol(
    evaluate: EvaluateJob,
    encoder: EncoderConfig,
    *,
    seed: int,
    num_val_images: int,
    feature_identity: str,
    input_keys: dict[str, str],
) -> dict[str, Any]:
    """Everything that decides the value of a number.

    Args:
        evaluate: Settings of the stage.
        encoder: The frozen encoder.
        seed: Seed of noise, untrained network and bootstrap.
        num_val_images: Photos used.
        feature_identity: Extractor, input size and sha256 of its weights.
        input_keys: Keys of the measured stages.
    """
    return {
        "num_val_images": num_val_images,
        "num_samples": evaluate.num_samples,
        "seed": seed,
        "feature_extractor": evaluate.feature_extractor,
        "feature_identity": feature_identity,
        "encoder": encoder.source,
        "sampler": evaluate.sampler,
        "num_grid_points": evaluate.num_grid_points,
        "grid_end": evaluate.grid_end,
        "sde_churn": evaluate.sde_churn if evaluate.sampler == "sde" else None,
        "cfg_scale": evaluate.cfg_scale,
        "autoguidance_scale": evaluate.autoguidance_scale,
        "guidance_interval": to_json(evaluate.guidance_interval),
        "internal_scale": evaluate.internal_scale,
        "internal_interval": to_json(evaluate.internal_interval),
        "decoder_for_samples": evaluate.decoder_for_samples,
        "label_policy": "balanced: class of sample i is i modulo the number of classes",
        "noise_policy": "function of (seed, sample index), shared by all guidances",
        "uint8_policy": "clamp to [0, 1], times 255, truncated",
        "reference": "held-out photos of the shard stage, ids 0 to num_val_images - 1",
        "lpips_net": evaluate.lpips_net,
        "precision": evaluate.precision,
        "dtype": f"{evaluate.precision} encoder, decoders and generator, float32 features and "
        "LPIPS, float64 statistics",
        "bootstrap_replicates": evaluate.bootstrap_replicates,
        "input_keys": dict(input_keys),
        "caveats": caveats(evaluate, encoder, num_val_images),
    }


def caveats(evaluate: EvaluateJob, encoder: EncoderConfig, num_val_images: int) -> list[str]:
    """Sentences for the report: what the numbers do not mean."""
    lines = []
    if evaluate.feature_extractor != "inception-v3":
        lines.append(
            "FD, KID, precision, recall and the score use EfficientNet-Lite0 features, not "
            "Inception-v3: they compare "
            "with no published FID, KID or Inception Score, only with one another."
        )
    smallest = min(num_val_images, evaluate.num_samples)
    if smallest < SMALL_SET:
        lines.append(
            f"The smallest set has {smallest} images. A Frechet distance of small sets is biased "
            "upwards, so rows with another "
            "N are on another scale, and real photos do not reach 0."
        )
    if "saliency" in encoder.source:
        lines.append(
            "The encoder is a DINOv2-S that was fine-tuned for saliency, which costs semantics: "
            "results say nothing about the "
            "untouched DINOv2."
        )
    if evaluate.lpips_net == "vgg":
        lines.append(
            "LPIPS uses the VGG trunk that is also part of the training loss, as in RAE; set "
            "evaluate.lpips_net=alex for a trunk "
            "that training has not seen."
        )
    lines.append(
        "Intervals of reconstruction metrics cover the choice of photos only, not the training "
        "seed: one run is one seed."
    )
    lines.append(
        "Reconstructions are truncated to 8 bits, as RAE does, which lowers PSNR slightly against "
        "rounding."
    )
    lines.append(
        "Generation rows carry no interval. The standard deviation beside KID is over subsets of "
        "the same samples."
    )
    return lines
