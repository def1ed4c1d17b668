from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from data_fakes import context, job, make_folder, shard_output
from torch import nn

from drorae.config import Compute
from drorae.data import hidden_states
from drorae.data.hidden_states import (
    HiddenStates,
    check_kept,
    encoder_digest,
    hidden_cache_path,
    to_unit,
)
from drorae.data.images import ImageShards
from drorae.models.encoder_config import EncoderConfig
from drorae.models.random_encoder import build_random_encoder


class FakeEncoder(nn.Module):
    """Two layers, four tokens, two channels: mean colours; counts its calls."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.images_seen = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.images_seen += len(images)
        tokens = nn.functional.adaptive_avg_pool2d(images[:, :2], 2).flatten(2).transpose(1, 2)
        return torch.stack([tokens, tokens * 3], dim=1) * self.scale


@pytest.fixture
def shards(tmp_path: Path) -> ImageShards:
    source = make_folder(tmp_path / "photos", per_class=10)
    return ImageShards(shard_output(tmp_path, job(source)), "train")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_states, "BLOCK_IMAGES", 4)


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_cached_states_equal_computed_ones(shards: ImageShards, tmp_path: Path, mode):
    ids = np.array([9, 0, 3, 3])
    plain = HiddenStates(shards, FakeEncoder(), batch_images=3).read(ids)
    kept = HiddenStates(shards, FakeEncoder(), mode, tmp_path, encoder_key="k").read(ids)
    assert plain.shape == (4, 2, 4, 2)
    assert plain.dtype == kept.dtype == torch.float16
    assert torch.equal(plain, kept)
    expected = FakeEncoder()(to_unit(shards.read(ids)[0]))
    torch.testing.assert_close(plain.float(), expected, rtol=1e-3, atol=1e-4)


def test_each_image_is_encoded_once(shards: ImageShards, tmp_path: Path):
    encoder = FakeEncoder()
    states = HiddenStates(shards, encoder, "memory")
    seen: list[tuple[int, int]] = []
    states.fill(on_progress=lambda done, total: seen.append((done, total)))
    states.read(np.arange(len(shards)))
    assert encoder.images_seen == len(shards) == len(states)
    assert seen[-1] == (states.num_blocks, states.num_blocks)


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_threads_that_want_one_block_compute_it_once(shards: ImageShards, tmp_path: Path, mode):
    encoder = FakeEncoder()
    states = HiddenStates(shards, encoder, mode, tmp_path, encoder_key="k")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(states.read, [np.arange(len(shards))] * 4))
    assert encoder.images_seen == len(shards)


def test_disk_blocks_outlive_the_process_and_are_shared_by_ranks(shards, tmp_path: Path):
    for rank in range(2):
        states = HiddenStates(shards, FakeEncoder(), "disk", tmp_path, encoder_key="k")
        states.fill(rank=rank, world_size=2)
    reader = FakeEncoder()
    HiddenStates(shards, reader, "disk", tmp_path, encoder_key="k").read(np.arange(len(shards)))
    assert reader.images_seen == 0
    assert not list(tmp_path.rglob("*.tmp"))


def test_another_encoder_has_another_cache(shards: ImageShards, tmp_path: Path):
    HiddenStates(shards, FakeEncoder(), "disk", tmp_path, encoder_key="a").fill()
    other = FakeEncoder(2.0)
    HiddenStates(shards, other, "disk", tmp_path, encoder_key="b").read(np.array([0]))
    assert other.images_seen == 4


def test_digest_follows_the_weights():
    first = encoder_digest(build_random_encoder(seed=0))
    assert first == encoder_digest(build_random_encoder(seed=0))
    assert first != encoder_digest(build_random_encoder(seed=1))


def test_encoder_without_digest_needs_a_key(shards: ImageShards, tmp_path: Path):
    with pytest.raises(ValueError, match="pass encoder_key"):
        HiddenStates(shards, FakeEncoder(), "disk", tmp_path)


def test_overflow_is_told(shards: ImageShards):
    with pytest.raises(RuntimeError, match="range of float16"):
        HiddenStates(shards, FakeEncoder(1e9)).read(np.array([0]))


def test_unknown_mode_is_told(shards: ImageShards):
    with pytest.raises((ValueError, TypeError), match="ram"):
        HiddenStates(shards, FakeEncoder(), "ram")  # pyright: ignore[reportArgumentType]


def test_failed_write_leaves_no_block(shards: ImageShards, tmp_path: Path, monkeypatch):
    def fail(*args: object) -> None:
        raise OSError("disk full")

    states = HiddenStates(shards, FakeEncoder(), "disk", tmp_path, encoder_key="k")
    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        states.read(np.array([0]))
    assert not list((tmp_path / "hidden").rglob("block*"))


def test_cache_lies_beside_a_local_workspace(tmp_path: Path):
    ctx = context(tmp_path)
    assert hidden_cache_path(ctx) == tmp_path / "cache"
    ctx.output_uri = "s3://bucket/stages/shard/key"
    assert hidden_cache_path(ctx) == tmp_path / "user-cache"
    ctx.compute = Compute(cache_path="/elsewhere")
    assert hidden_cache_path(ctx) == Path("/elsewhere")


def test_filling_nothing_does_nothing(shards: ImageShards):
    encoder = FakeEncoder()
    HiddenStates(shards, encoder).fill()
    assert encoder.images_seen == 0


def test_what_cannot_be_kept_on_disk_is_refused():
    dino = EncoderConfig(source="x", width=768, depth=12)
    for mode in ("none", "memory"):
        check_kept(mode, 10**9, dino, is_shared=False)
    check_kept("disk", 40_000, dino, is_shared=True)
    with pytest.raises(ValueError, match=r"would keep 6,045 GB \(1,281,167 images of 4\.7 MB"):
        check_kept("disk", 1_281_167, dino, is_shared=True)
    with pytest.raises(ValueError, match=r"compute\.cache_path"):
        check_kept("disk", 10, dino, is_shared=False)
