from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from data_fakes import committed, context, job, make_folder, shard_output

from drorae.config import to_json
from drorae.data.batches import to_unit
from drorae.data.hidden_states import HiddenStates, encoder_digest
from drorae.data.images import ImageShards
from drorae.data.latent_shards import LatentShards
from drorae.data.latents import LatentJob, run_latents
from drorae.data.shard_map import run_in_process
from drorae.models.autoencoder import tokens_to_map
from drorae.models.encoder import EncoderConfig, build_encoder
from drorae.models.fusion import FusionConfig, build_fusion
from drorae.models.random_encoder import build_random_encoder
from drorae.store.context import StageResult


class Setting:
    """A shard output, a random encoder in a folder, and a fusion output."""

    def __init__(self, root: Path) -> None:
        self.root = root
        source = make_folder(root / "photos", per_class=8)
        self.shard = shard_output(root, job(source))
        random = build_random_encoder("dinov2", depth=3)
        random.backbone.save_pretrained(root / "encoder")
        sizes = {"input_px": 16, "patch_px": 4, "width": 32, "depth": 3}
        self.config = EncoderConfig(source=str(root / "encoder"), **sizes)
        self.encoder = build_encoder(self.config)
        self.more_inputs: dict = {}
        self.set_fusion(FusionConfig(expert_hidden=8))

    def set_fusion(self, settings: FusionConfig) -> None:
        self.fusion = build_fusion(settings, 3, 32, layer_norm_eps=1e-6)
        for parameter in self.fusion.parameters():
            parameter.data.normal_(std=0.2)
        ctx = context(self.root / settings.kind, "fusion")
        weights = safetensors.torch.save(self.fusion.state_dict())
        settings_json = {"encoder": to_json(self.config), "model": to_json(settings)}
        entries = [
            ctx.put_bytes("fusion.safetensors", weights),
            ctx.put_json("config.json", settings_json),
        ]
        self.fused = committed(ctx, StageResult(files=entries))

    def add_statistics(self, *shape: int) -> dict[str, torch.Tensor]:
        """A decoder output with imported statistics of that shape."""
        stats = {"mean": torch.randn(shape), "var": torch.rand(shape) + 0.5}
        ctx = context(self.root / "imported", "decoder")
        entries = [ctx.put_bytes("stats.safetensors", safetensors.torch.save(stats))]
        self.more_inputs["decoder"] = committed(ctx, StageResult(files=entries))
        return stats

    def run(self, name: str = "latents", **changes):
        inputs = {"shard": self.shard, "fusion": self.fused, **self.more_inputs}
        ctx = context(self.root / name, "latents", inputs)
        latents = LatentJob(**{"batch_images": 4, **changes})
        result = run_latents(ctx, encoder=self.config, latents=latents, executor=run_in_process)
        return committed(ctx, result)

    def expected(self, flip: bool = False) -> np.ndarray:
        shards = ImageShards(self.shard, "train")
        images = to_unit(shards.read(np.arange(len(shards)))[0])
        images = images.flip(-1) if flip else images
        with torch.no_grad():
            return tokens_to_map(self.fusion(self.encoder(images)).latent).numpy()


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


def test_latents_and_statistics_are_those_of_the_modules(setting: Setting):
    shards = LatentShards(setting.run())
    expected = setting.expected()
    assert shards.shape == expected.shape[1:]
    stored, labels = shards.read(np.arange(len(shards)))
    assert stored.dtype == torch.float16
    raw, stats = stored.float(), shards.stats
    # float16 storage and float16 hidden states: relative 5e-4 each
    np.testing.assert_allclose(raw.numpy(), expected, atol=5e-3)
    values = stored.double().numpy()
    np.testing.assert_allclose(stats["mean"].numpy(), values.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["var"].numpy(), values.var(0), rtol=1e-4, atol=1e-6)
    assert labels.tolist() == ImageShards(setting.shard, "train").labels.tolist()
    assert shards.labels.tolist() == labels.tolist()


def test_a_coarser_number_format_moves_latents_a_little(setting: Setting):
    exact, coarse = LatentShards(setting.run("a")), setting.run("b", precision="bfloat16")
    ids = np.arange(len(exact))
    expected, found = exact.read(ids)[0].float(), LatentShards(coarse).read(ids)[0].float()
    moved = (found - expected).square().mean().sqrt() / expected.std()
    assert 1e-4 < moved < 0.03  # bfloat16 has 8 bits


def test_rerun_writes_the_same_bytes(setting: Setting):
    first, second = setting.run("a"), setting.run("b")
    assert first.manifest.files == second.manifest.files


def test_mirrored_latents_are_stored_on_request(setting: Setting):
    shards = LatentShards(setting.run(flip=True))
    ids = np.arange(3)
    values, _ = shards.read(ids, np.array([True, False, True]))
    raw = values.float().numpy()
    np.testing.assert_allclose(raw[0], setting.expected(flip=True)[0], atol=5e-3)
    np.testing.assert_allclose(raw[1], setting.expected()[1], atol=5e-3)
    assert shards.has_flip


def test_a_filled_hidden_state_cache_is_used_without_pictures_and_changes_nothing(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
):
    plain = setting.run("a")
    shards = ImageShards(setting.shard, "train")
    key = encoder_digest(setting.encoder)
    cache = setting.root / "b" / "cache"
    states = HiddenStates(shards, setting.encoder, "disk", cache, encoder_key=key, batch_images=4)
    states.fill()
    monkeypatch.delattr(ImageShards, "read")
    cached = LatentShards(setting.run("b")).read(np.arange(4))[0]
    # the same float16 hidden states up to one rounding step of differently grouped sums
    torch.testing.assert_close(cached, LatentShards(plain).read(np.arange(4))[0], atol=2e-2, rtol=0)


def test_another_encoder_than_the_fusions_is_refused(setting: Setting):
    setting.config = EncoderConfig(source="elsewhere", input_px=16, patch_px=4, width=32, depth=3)
    with pytest.raises(ValueError, match="was trained with encoder"):
        setting.run()


def test_damaged_fusion_weights_are_told(setting: Setting):
    broken = {k: torch.full_like(v, float("nan")) for k, v in setting.fusion.state_dict().items()}
    Path(setting.fused.uri_of("fusion.safetensors")).write_bytes(safetensors.torch.save(broken))
    with pytest.raises(RuntimeError, match="range of float16"):
        setting.run()


def test_wrong_requests_are_told(setting: Setting):
    shards = LatentShards(setting.run())
    with pytest.raises(IndexError, match="out of range"):
        shards.read(np.array([999]))
    with pytest.raises(ValueError, match=r"latents\.flip=true"):
        shards.read(np.array([0]), np.array([True]))
    with pytest.raises(ValueError, match=r"latents\.batch_images"):
        LatentJob(batch_images=0)


def test_imported_statistics_normalise_raes_latents(setting: Setting):
    setting.set_fusion(FusionConfig(kind="rae"))
    given = setting.add_statistics(32, 4, 4)
    computed = LatentShards(setting.run("a"))
    output = setting.run("b", stats="imported")
    shards, ids = LatentShards(output), np.arange(3)
    assert torch.equal(shards.stats["mean"], given["mean"])
    assert torch.equal(shards.stats["var"], given["var"])
    raw = shards.read(ids)[0].float()
    np.testing.assert_allclose(raw.numpy(), setting.expected()[:3], atol=5e-3)
    gap = (given["var"] - computed.stats["var"]).abs().mean().item()
    assert output.manifest.metrics["latents/imported_var_gap"] == pytest.approx(gap, rel=1e-5)


def test_statistics_of_other_latents_are_refused(setting: Setting):
    setting.add_statistics(32, 4, 4)
    with pytest.raises(ValueError, match="fusion of kind drorae"):
        setting.run("a", stats="imported")
    setting.set_fusion(FusionConfig(kind="rae"))
    setting.add_statistics(32, 8, 8)
    with pytest.raises(ValueError, match=r"shape \(32, 8, 8\).*\(32, 4, 4\)"):
        setting.run("b", stats="imported")
