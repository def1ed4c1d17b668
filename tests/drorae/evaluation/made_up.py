"""Made-up metrics, pictures and logs for tests of the report: plausible shapes, no measurement."""

import json
from typing import Any

import numpy as np

from drorae.evaluation.grids import image_grid, png_bytes
from drorae.evaluation.report_data import ReportData, StageRow, parse_log

STAGES = (
    "shard",
    "decoder",
    "fusion",
    "finetune",
    "control",
    "latents",
    "diffusion",
    "guide",
    "evaluate",
)


def interval(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "lo": mean - half, "hi": mean + half}


def columns(psnr: float, ssim: float, lpips: float, half: float) -> dict[str, Any]:
    return {
        "psnr": interval(psnr, half),
        "ssim": interval(ssim, half / 50),
        "lpips": interval(lpips, half / 50),
    }


def generated(fd: float, decoder: str | None = "finetune", num_images: int = 500) -> dict[str, Any]:
    return {
        "fd": fd,
        "fd_torch_fidelity": None,
        "kid": fd / 5000,
        "kid_std": 0.0004,
        "precision": 0.5,
        "recall": 0.3,
        "score": 20.0 - fd / 20,
        "num_images": num_images,
        "decoder": decoder,
    }


def metrics() -> dict[str, Any]:
    models = {
        "rae": columns(18.4, 0.61, 0.30, 0.2),
        "fusion": columns(19.9, 0.68, 0.26, 0.2),
        "finetune": columns(21.3, 0.74, 0.20, 0.2),
        "control": columns(18.9, 0.63, 0.29, 0.2),
    }
    for model, fd in zip(models, (88.0, 71.0, 52.0, 84.0), strict=True):
        models[model]["fd"] = {"mean": fd, "lo": None, "hi": None}
    layers = np.cos(np.arange(12) / 2.0) / 4
    return {
        "reconstruction": models,
        "differences": {
            "fusion-rae": columns(1.5, 0.07, -0.04, 0.1),
            "finetune-rae": columns(2.9, 0.13, -0.10, 0.1),
            "finetune-control": columns(2.4, 0.0, 0.09, 0.1),
        },
        "generation": {
            "unguided": generated(141.0),
            "unguided@decoder": generated(150.0, "decoder"),
            "cfg": generated(128.0),
            "autoguidance": generated(133.0),
            "autoguidance@decoder": generated(139.0, "decoder"),
            "untrained": generated(390.0),
            "reconstruction": generated(61.0),
            "real": generated(44.0, None),
        },
        "diagnostics": {
            "routing": {
                "mean": layers.tolist(),
                "std": [0.08] * 12,
                "positive_share": [0.5] * 12,
                "effective_layers": 6.3,
                "total_variation": 0.1,
                "raw_norm": 1.4,
            },
            "angles": {
                "angle_mean_degrees": 13.9,
                "angle_p95_degrees": 14.4,
                "angle_max_degrees": 14.47,
                "angle_bound_degrees": 14.4775,
                "near_bound_share": 0.4,
                "cosine_latent_base": 0.97,
                "cosine_fused_base": -0.12,
                "cosine_at_bound": -0.25,
            },
            "angle_histogram": {
                "counts": [1.0, 2.0, 8.0, 20.0, 60.0, 140.0, 300.0],
                "edges_degrees": np.linspace(11, 14.5, 8).tolist(),
            },
            "spectra": {
                name: {
                    "mean_absolute": 0.5,
                    "absolute": [0.1] * 8,
                    "signed": (slope * np.arange(8)).tolist(),
                }
                for name, slope in (("rae", -0.3), ("fusion", -0.2), ("finetune", -0.1))
            },
            "sensitivity": {
                name: {
                    "relative_norm": [0.01, 0.02, 0.05, 0.1],
                    "lpips": [k * v for v in (1, 2, 6, 14)],
                }
                for name, k in (("decoder", 0.0006), ("finetune", 0.0009))
            },
        },
        "meta": {
            "num_val_images": 1000,
            "num_samples": 500,
            "feature_extractor": "efficientnet-lite0",
            "seed": 0,
            "caveats": [
                "Features are EfficientNet-Lite0, not Inception-v3.",
                "One run is one seed.",
            ],
        },
    }


def log_text(names: dict[str, float]) -> str:
    generator = np.random.default_rng(0)
    lines = []
    for step in range(0, 1000, 10):
        noise = generator.normal(size=len(names)) * 0.03
        values = {
            name: level * (0.4 + np.exp(-step / 250) + noise[i])
            for i, (name, level) in enumerate(names.items())
        }
        lines.append(json.dumps({"step": step, **values, "speed/images_per_s": 31.0}))
    return "\n".join(lines) + "\n"


def pictures() -> dict[str, bytes]:
    generator = np.random.default_rng(1)
    noise = generator.integers(0, 256, size=(8, 4, 4, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    rows = [noise, noise // 2 + 60, noise // 2 + 40]
    grid = png_bytes(image_grid(rows, row_labels=["photo", "rae", "fusion"]))
    names = ("reconstruction", "routing", "samples-unguided", "samples-cfg", "samples-autoguidance")
    return dict.fromkeys(names, grid)


def stage_rows() -> list[StageRow]:
    return [
        StageRow(
            stage=stage,
            key=f"{i:016x}",
            seed="0" if stage != "shard" else "-",
            code_digest="0123456789ab",
            wall_s=60.0 * i,
            device_hours=i / 30,
            attempt=1,
            created_at="2026-01-01T00:00:00Z",
            hardware={"cpu": "Example <CPU>", "cores": 2},
            packages={"torch": "2.15.0", "ray": "2.60.0"},
            weights=[(f"{stage}.safetensors", 1_234_567, "ab" * 32)],
        )
        for i, stage in enumerate(STAGES)
    ]


def report_data() -> ReportData:
    tokenizer = {"loss": 1.0, "l1": 0.2, "lpips": 0.5, "adversarial": 0.1}
    curves = []
    for stage in ("decoder", "fusion", "finetune"):
        curves += parse_log(stage, log_text(tokenizer), 200)
    curves += parse_log("diffusion", log_text({"loss": 1.1, "grad_norm": 0.8}), 200)
    return ReportData(
        recipe="smoke",
        metrics=metrics(),
        pictures=pictures(),
        curves=curves,
        stages=stage_rows(),
        counts={
            "train": {"rows": 4000},
            "val": {"rows": 1000},
            "class_names": ["cat", "dog"],
            "resolution_px": 32,
        },
    )
