"""Tiny finished stages with random weights: everything that evaluate reads, made in a second
without training."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import save, save_file
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from drorae.config import Compute, to_json
from drorae.data.shard_format import PICTURE_SCHEMA, part_name, write_index, write_picture_shard
from drorae.evaluation.features import Features, file_sha256
from drorae.models.decoder import Decoder, DecoderConfig
from drorae.models.dit import DiT, DiTConfig
from drorae.models.encoder import EncoderConfig
from drorae.models.fusion import FusionConfig, build_fusion
from drorae.models.random_encoder import build_random_encoder
from drorae.store.context import StageContext, StageResult
from drorae.store.manifest import Manifest
from drorae.store.workspace import StageOutput

NUM_TRAIN, NUM_VAL, SIDE_PX, CLASSES = 9, 10, 32, ("cat", "dog", "ship")
WIDTH, GRID = 16, 4


def commit(folder: Path, stage: str, write: Callable[[StageContext], StageResult]) -> StageOutput:
    """Run a writer and wrap what it wrote as a committed output."""
    ctx = StageContext(stage=stage, key=f"{stage}-key", output_uri=str(folder / stage))
    result = write(ctx)
    return output_of(ctx, result)


def output_of(ctx: StageContext, result: StageResult) -> StageOutput:
    manifest = Manifest(
        stage=ctx.stage,
        key=ctx.key,
        version="1",
        config={},
        input_keys={},
        files=tuple(result.files),
        metrics=dict(result.metrics),
        seed=0,
        code_digest="0" * 64,
        packages={"torch": "2"},
        hardware={"cpu": "test"},
        wall_s=1.0,
        device_hours=0.1,
        attempt=1,
        run_ids={},
        created_at="2026-01-01T00:00:00Z",
    )
    return StageOutput(uri=ctx.output_uri, manifest=manifest)


def write_shards(ctx: StageContext) -> StageResult:
    generator = np.random.default_rng(0)
    counts: dict[str, Any] = {
        "class_names": list(CLASSES),
        "resolution_px": SIDE_PX,
        "rejected": 0,
    }
    entries = []
    for split, rows in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        pixels = generator.integers(0, 256, size=(rows, 4, 4, 3), dtype=np.uint8)
        pictures = [
            {
                "id": row,
                "key": str(row),
                "label": row % 3,
                "image": _png(coarse.repeat(8, 0).repeat(8, 1)),
                "source_sha256": "",
                "source_width": SIDE_PX,
                "source_height": SIDE_PX,
            }
            for row, coarse in enumerate(pixels)
        ]
        batch = pa.RecordBatch.from_pylist(pictures, schema=PICTURE_SCHEMA)
        name = part_name(split, 0)
        part = write_picture_shard(ctx.output_uri, name, batch)
        entries += [part.entry, write_index(ctx.output_uri, split, [part])]
        counts[split] = {"rows": rows, "shards": [rows]}
    settings = ctx.put_json("config.json", {"shard": {"pictures": "square"}})
    return StageResult(files=[*entries, settings, ctx.put_json("counts.json", counts)])


def write_module(
    name: str, module: torch.nn.Module, config: dict[str, Any]
) -> Callable[[StageContext], StageResult]:
    state = {k: v.detach().contiguous().clone() for k, v in module.state_dict().items()}
    log = b'{"step": 0, "loss": 2.0}\n{"step": 10, "loss": 1.0}\n'

    def write(ctx: StageContext) -> StageResult:
        return StageResult(
            files=[
                ctx.put_bytes(f"{name}.safetensors", save(state)),
                ctx.put_json("config.json", config),
                ctx.put_bytes("train_log.jsonl", log),
            ]
        )

    return write


def write_latents(ctx: StageContext) -> StageResult:
    stats = {"mean": torch.zeros(WIDTH, GRID, GRID), "var": torch.full((WIDTH, GRID, GRID), 0.9)}
    return StageResult(files=[ctx.put_bytes("stats.safetensors", save(stats))])


def make_encoder(folder: Path) -> EncoderConfig:
    """A random encoder of three layers, saved where its configuration says."""
    encoder = build_random_encoder("dinov2", width=WIDTH, depth=3)
    encoder.backbone.save_pretrained(folder)
    return EncoderConfig(source=str(folder), input_px=16, patch_px=4, width=WIDTH, depth=3)


def make_outputs(folder: Path, encoder_config: EncoderConfig) -> dict[str, StageOutput]:
    """All stages that evaluate reads."""
    torch.manual_seed(0)
    found = {"shard": commit(folder, "shard", write_shards)}
    decoder = DecoderConfig(
        latent_channels=WIDTH, width=16, layers=1, heads=2, mlp_hidden=16, grid=GRID, patch_px=8
    )
    fusion = FusionConfig(expert_hidden=8)
    dit = DiTConfig(
        input_size=GRID,
        in_channels=WIDTH,
        hidden_size=(16, 16),
        depth=(1, 1),
        num_heads=(2, 2),
        num_classes=3,
    )
    encoder = to_json(encoder_config)
    settings = {"encoder": encoder, "model": to_json(decoder)}
    for stage in ("decoder", "finetune", "control"):
        found[stage] = commit(folder, stage, write_module("decoder", Decoder(decoder), settings))
    module = build_fusion(fusion, 3, WIDTH)
    settings = {"encoder": encoder, "model": to_json(fusion)}
    found["fusion"] = commit(folder, "fusion", write_module("fusion", module, settings))
    found["latents"] = commit(folder, "latents", write_latents)
    for stage in ("diffusion", "guide"):
        model = DiT(dit)
        for parameter in model.final_layer.parameters():  # a fresh model predicts zero
            torch.nn.init.normal_(parameter, std=0.3)
        settings = {"model": to_json(dit)}
        found[stage] = commit(folder, stage, write_module("dit", model, settings))
    return found


def make_lpips(folder: Path) -> Path:
    """Random AlexNet LPIPS weights under the name of the real asset."""
    torch.manual_seed(0)
    widths = ((3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3))
    lpips = {f"lin.{i}.weight": torch.rand(1, out, 1, 1) for i, (_, out, _) in enumerate(widths)}
    for i, (channels, out, size) in enumerate(widths):
        lpips[f"trunk.{i}.weight"] = torch.randn(out, channels, size, size) / (size * channels**0.5)
        lpips[f"trunk.{i}.bias"] = torch.zeros(out)
    save_file(lpips, folder / "lpips-alex.safetensors")
    return folder / "lpips-alex.safetensors"


@pytest.fixture(scope="session")
def encoder_config(tmp_path_factory: pytest.TempPathFactory) -> EncoderConfig:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def outputs(
    tmp_path_factory: pytest.TempPathFactory, encoder_config: EncoderConfig
) -> dict[str, StageOutput]:
    return make_outputs(tmp_path_factory.mktemp("stages"), encoder_config)


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LPIPS weights, and a stand-in for those of the features."""
    folder = tmp_path_factory.mktemp("assets")
    (folder / "efficientnet-lite0.safetensors").write_bytes(b"stand-in")
    make_lpips(folder)
    return folder


@pytest.fixture
def context(tmp_path: Path, outputs: dict[str, StageOutput]) -> StageContext:
    return StageContext(
        stage="evaluate",
        key="evaluate-key",
        output_uri=str(tmp_path / "evaluate"),
        inputs=dict(outputs),
        compute=Compute(threads_per_worker=1, cache_path=str(tmp_path / "cache")),
    )


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


class TinyExtractor(FeatureExtractorBase):
    """Twelve colour averages instead of 1280 channels: distances in a millisecond."""

    def __init__(self) -> None:
        super().__init__("tiny", ["pooled", "logits"])

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("pooled", "logits")

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pooled = torch.nn.functional.adaptive_avg_pool2d(input.float() / 255, 2).flatten(1)
        return pooled, pooled[:, :5]


def build_tiny_features(kind: str, weights_path: Path, **settings: Any) -> Features:
    return Features(
        TinyExtractor(),
        identity=f"tiny:{kind}:{file_sha256(weights_path)}",
        batch_images=settings["batch_images"],
    )
