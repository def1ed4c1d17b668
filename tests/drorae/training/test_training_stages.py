"""The training stages as each worker runs them, in this process: real shards, a random encoder."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from drorae.config import Compute
from drorae.data.hidden_states import hidden_in_step
from drorae.data.jobs import ShardJob
from drorae.data.order import epoch_ids
from drorae.data.random_crops import RandomCrops
from drorae.data.shard_map import run_in_process
from drorae.data.sharding import run_shard
from drorae.models.decoder_config import DecoderConfig
from drorae.models.discriminator_config import DiscriminatorConfig
from drorae.models.encoder import EncoderConfig, build_encoder
from drorae.models.fusion_config import FusionConfig, blocks_read
from drorae.models.random_encoder import build_random_encoder
from drorae.store.context import StageContext, StageResult
from drorae.store.stage_run import run_once
from drorae.store.workspace import StageOutput, Workspace
from drorae.training import stages, watchdog
from drorae.training.jobs import (
    AdversarialConfig,
    DecoderStage,
    FusionStage,
    OptimConfig,
    TokenizerTraining,
)
from drorae.training.stages import _Tools
from drorae.training.tokenizer import noised
from drorae.training.watchdog import Watchdog, watched
from drorae.training.world import World

WIDTH, DEPTH, NUM_IMAGES = 32, 3, 12
JUDGE = DiscriminatorConfig(
    source="random", input_px=8, patch_px=4, width=8, depth=2, heads=2, taps=(1, 2), kernel=3
)
TRAIN = TokenizerTraining(
    num_steps=7,
    batch_images=4,
    optim=OptimConfig(lr=1e-2),
    lpips_weight=0.0,
    view="random_crop",
    adversarial=AdversarialConfig(
        weight=0.5, discriminator=JUDGE, start_epoch=1.5, learn_from_epoch=1.0
    ),
    eval_every_steps=7,
)
SHAPE = DecoderConfig(
    latent_channels=WIDTH, width=16, layers=1, heads=2, mlp_hidden=16, grid=4, patch_px=4
)


def commit(
    root: Path, stage: str, inputs: dict[str, StageOutput], build: Callable[..., StageResult]
) -> StageOutput:
    place = Workspace(str(root / "workspace"))
    compute = Compute(threads_per_worker=1, log_every_steps=1)
    ctx = StageContext(
        stage=stage,
        key="key",
        output_uri=place.stage_uri(stage, "key"),
        inputs=inputs,
        compute=compute,
    )
    return run_once(place, stage, "key", lambda: build(ctx))[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training and two validation photos of 30 x 24, an encoder, and the shards."""
    root = tmp_path_factory.mktemp("stages")
    for number in range(NUM_IMAGES + 2):
        folder = root / "photos" / ("val" if number >= NUM_IMAGES else "train") / "cat"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (24, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    random = build_random_encoder("dinov2", depth=DEPTH, width=WIDTH)
    random.backbone.save_pretrained(root / "encoder")
    return root


@pytest.fixture(scope="module")
def encoder(root: Path) -> EncoderConfig:
    sizes = {"input_px": 16, "patch_px": 4, "width": WIDTH, "depth": DEPTH}
    return EncoderConfig(source=str(root / "encoder"), **sizes)


@pytest.fixture(scope="module")
def shard(root: Path) -> StageOutput:
    photos = root / "photos"
    job = ShardJob(
        source=str(photos / "train"),
        val_source=str(photos / "val"),
        resolution_px=16,
        pictures="source",
        view_px=24,
        rows_per_shard=5,
    )
    return commit(root, "shard", {}, lambda ctx: run_shard(ctx, shard=job, executor=run_in_process))


@pytest.fixture(scope="module")
def decoder(root: Path, shard: StageOutput, encoder: EncoderConfig) -> StageOutput:
    section = DecoderStage(model=SHAPE, train=TRAIN)
    return commit(
        root,
        "decoder",
        {"shard": shard},
        lambda ctx: stages._train_decoder(ctx, World(), seed=0, encoder=encoder, decoder=section),
    )


def history(output: StageOutput) -> list[dict[str, float]]:
    return [json.loads(line) for line in output.local("train_log.jsonl").read_text().splitlines()]


def losses(output: StageOutput) -> list[float]:
    return [row["train/l1"] for row in history(output) if "train/l1" in row]


def test_a_decoder_trains_on_random_crops_that_are_encoded_in_the_step(
    decoder: StageOutput, shard: StageOutput, encoder: EncoderConfig
) -> None:
    rows = [row for row in history(decoder) if "train/l1" in row]
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert "decoder.safetensors" in decoder.names()
    # The first step, computed by hand from the same crops, fresh decoder and noise.
    torch.manual_seed(0)
    model = build_encoder(encoder)
    network = stages.Decoder(SHAPE)
    crops = RandomCrops(shard, seed=0)
    images = crops.read(epoch_ids(0, 0, crops.shard_rows, 4, 1, 0)[0], 0)[0] / 255.0
    tokens = model.base(model(images)[:, -1].half().float())
    recon = network(noised(tokens, TRAIN, 0, torch.arange(4)))
    expected = (recon - images).abs().mean().item()
    assert rows[0]["train/l1"] == pytest.approx(expected, rel=1e-5)


def test_both_units_of_the_schedule_are_recorded_and_obeyed(decoder: StageOutput) -> None:
    expected = {
        "steps_per_epoch": 3.0,
        "length_steps": 7.0,
        "length_epochs": 7 / 3,
        "gan_start_steps": 4.0,
        "gan_start_epochs": 4 / 3,
        "discriminator_start_steps": 3.0,
        "discriminator_start_epochs": 1.0,
    }
    assert decoder.read_json("config.json")["schedule"] == pytest.approx(expected)
    metrics = decoder.manifest.metrics
    assert {k: metrics[f"schedule/{k}"] for k in expected} == pytest.approx(expected)
    rows = [row for row in history(decoder) if "train/l1" in row]
    assert [row["step"] for row in rows if "train/gan" in row] == [5, 6, 7]
    assert [row["step"] for row in rows if "train/discriminator" in row] == [4, 5, 6, 7]


def test_crops_and_squares_give_other_losses_and_a_square_needs_no_kept_states(
    root: Path, shard: StageOutput, encoder: EncoderConfig, decoder: StageOutput
) -> None:
    def train(name: str, **changes: Any) -> list[float]:
        plain = dataclasses.replace(TRAIN, view="fixed", adversarial=AdversarialConfig(), **changes)
        section = DecoderStage(model=SHAPE, train=plain)
        output = commit(
            root / name,
            "decoder",
            {"shard": shard},
            lambda ctx: stages._train_decoder(
                ctx, World(), seed=0, encoder=encoder, decoder=section
            ),
        )
        return losses(output)

    in_step, kept = train("a"), train("b", hidden_states="memory")
    # The same float16 states up to one rounding step of differently grouped sums.
    assert in_step == pytest.approx(kept, rel=1e-3)
    assert in_step[0] != pytest.approx(losses(decoder)[0], rel=1e-3)


def test_a_fusion_without_parameters_is_recorded_and_serves_the_later_stages(
    root: Path, shard: StageOutput, encoder: EncoderConfig, decoder: StageOutput
) -> None:
    section = FusionStage(model=FusionConfig(kind="rae"), train=TRAIN)
    inputs = {"shard": shard, "decoder": decoder}
    fusion = commit(
        root,
        "fusion",
        inputs,
        lambda ctx: stages.run_fusion(ctx, seed=0, encoder=encoder, fusion=section),
    )
    assert load_file(fusion.local("fusion.safetensors")) == {}
    tuned = commit(
        root,
        "finetune",
        {**inputs, "fusion": fusion},
        lambda ctx: stages._train_decoder_on(
            ctx, World(), seed=0, encoder=encoder, job=TRAIN, use_fusion=True
        ),
    )
    before = load_file(decoder.local("decoder.safetensors"))
    after = load_file(tuned.local("decoder.safetensors"))
    assert before.keys() == after.keys()
    assert not torch.equal(before["decoder_pred.weight"], after["decoder_pred.weight"])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (FusionConfig(kind="rae"), (12,)),
        (FusionConfig(kind="rae", deepest_layers=4), (12,)),
        (FusionConfig(kind="mean_last_k", deepest_layers=3), (9, 11, 12)),
        (FusionConfig(deepest_layers=2), (11, 12)),
        (FusionConfig(), (2, 9, 11, 12)),
    ],
)
def test_only_blocks_that_the_fusion_looks_at_are_read(
    config: FusionConfig, expected: tuple[int, ...]
) -> None:
    assert blocks_read(config, (2, 9, 11, 12)) == expected


@pytest.mark.parametrize("kind", ["rae", "mean_last_k", "drorae", "hirae", "angle_budget"])
def test_a_fusion_of_the_read_blocks_equals_that_of_all(kind: Any, encoder: EncoderConfig) -> None:
    model = build_encoder(encoder)
    config = FusionConfig(
        kind=kind,
        deepest_layers=2,
        expert_hidden=8,
        group_caps=(0.1,),
        group_dropout=(0.0,),
    )
    fusion = stages._build_fusion(config, model).eval()
    images = torch.rand(2, 3, 20, 16)
    blocks = blocks_read(config, encoder.block_numbers)
    few = hidden_in_step(model, blocks)(images)
    assert few.shape[1] == len(blocks) < DEPTH
    whole = model(images).half().float()
    torch.testing.assert_close(fusion(few).latent, fusion(whole).latent, rtol=0, atol=0)


class SlowTracker:
    """Waits for an absent server when it is closed."""

    def close(self) -> None:
        time.sleep(1.0)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


def test_an_exception_is_not_taken_for_a_hang_while_the_tracker_closes(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "REPORT_EVERY_S", (0.05, 0.05))
    monkeypatch.setattr(watchdog, "end_process", lambda code: None)
    monkeypatch.setattr(stages, "connect", lambda ctx: SlowTracker())
    hangs: list[tuple[int, str]] = []
    told = lambda rank, message: hangs.append((rank, message))  # noqa: E731
    ctx = StageContext(stage="fusion", key="k", output_uri=str(tmp_path / "out"))

    def loop(batches: Iterator[int]) -> None:
        for number in batches:
            if number == 2:
                raise ValueError("the first exception")

    with (
        Watchdog(str(tmp_path), 0, 1, 0.3, 5.0, told),
        pytest.raises(ValueError, match="the first exception"),
        _Tools(ctx, World()),
    ):
        loop(watched(lambda start: iter(range(4)))(0))
    assert not hangs
