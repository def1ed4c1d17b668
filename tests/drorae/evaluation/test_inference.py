from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_fakes import GRID, WIDTH, commit, write_module
from PIL import Image

from drorae.config import to_json
from drorae.data.images import ImageShards
from drorae.diffusion.guidance import GuidanceConfig
from drorae.evaluation.inference import SamplerSettings, reconstruct_files, sample_images
from drorae.evaluation.inspection import inspect_tokenizer
from drorae.evaluation.job import EvaluateJob
from drorae.evaluation.loading import load_generator, load_tokenizer
from drorae.evaluation.tasks import Extent, image_tasks, sampler_settings
from drorae.models.dit import DiT, DiTConfig
from drorae.store.workspace import StageOutput

SETTINGS = SamplerSettings(guidance=GuidanceConfig(kind="cfg", scale=1.5), num_grid_points=3)


def test_files_are_shown_beside_their_reconstructions(
    outputs: dict[str, StageOutput], tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    tokenizer = load_tokenizer(outputs)
    picture = reconstruct_files(tokenizer, [tmp_path / "photo.png"])
    assert picture.dtype == np.uint8
    assert picture.shape[1] > 4 * 64  # input, RAE, fusion, fine-tuned
    with pytest.raises(FileNotFoundError, match="does not exist"):
        reconstruct_files(tokenizer, [tmp_path / "none.png"])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot be used"):
        reconstruct_files(tokenizer, [tmp_path / "text.png"])


def test_a_tokenizer_in_bfloat16_can_be_inspected(outputs: dict[str, StageOutput]) -> None:
    found = inspect_tokenizer(
        load_tokenizer(outputs, precision="bfloat16"),
        load_generator(outputs),
        ImageShards(outputs["shard"], "val"),
        num_images=2,
        lpips=lambda first, second: (first - second).square().mean(dim=(1, 2, 3)),
        seed=0,
    )
    assert found.routing is not None
    assert found.routing.dtype == np.uint8


def test_a_sample_depends_on_its_index_not_on_its_batch(outputs: dict[str, StageOutput]) -> None:
    generator = load_generator(outputs)
    labels = torch.tensor([0, 1, 2])
    together = generator.sample(labels, [4, 5, 6], SETTINGS, 0)
    alone = generator.sample(labels[1:2], [5], SETTINGS, 0)
    # Batched matrix products round differently.
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)
    other_seed = generator.sample(labels[1:2], [5], SETTINGS, 1)
    assert not torch.allclose(alone, other_seed, atol=1e-2)


def test_an_untrained_generator_returns_its_noise_and_leaves_the_seed_alone(
    outputs: dict[str, StageOutput],
) -> None:
    generator = load_generator(outputs)
    state = torch.get_rng_state()
    floor = generator.untrained(0)
    assert torch.equal(torch.get_rng_state(), state)
    plain = SamplerSettings(guidance=GuidanceConfig(), num_grid_points=3, sampler="heun")
    latents = floor.sample(torch.zeros(40, dtype=torch.int64), list(range(40)), plain, 0)
    # Zero velocity: unit noise scaled by the stored deviation, sqrt(.9 + 1e-5).
    assert latents.std().item() == pytest.approx(0.9**0.5, rel=0.02)


def test_outputs_without_a_prediction_mean_the_velocity(outputs: dict[str, StageOutput]) -> None:
    generator = load_generator(outputs)
    assert (generator.prediction, generator.guide_prediction) == ("velocity", "velocity")


def test_a_stage_that_names_its_prediction_is_sampled_by_it(
    outputs: dict[str, StageOutput], tmp_path: Path
) -> None:
    config = DiTConfig(
        input_size=GRID,
        in_channels=WIDTH,
        hidden_size=16,
        depth=2,
        num_heads=2,
        num_classes=3,
        base_head_after=1,
    )
    settings = {"model": to_json(config), "prediction": "clean"}
    stage = commit(tmp_path, "diffusion", write_module("dit", DiT(config), settings))
    generator = load_generator({**outputs, "diffusion": stage})
    assert generator.prediction == "clean"
    assert generator.untrained(0).prediction == "clean"
    internal = SamplerSettings(
        guidance=GuidanceConfig(kind="internal", scale=1.78, t_min=0.1),
        num_grid_points=9,
        grid_end="zero",
    )
    latents = generator.sample(torch.tensor([0, 1]), [0, 1], internal, 0)
    # A fresh network predicts clean = 0 in both heads: the path shrinks the noise to its share.
    assert latents.abs().max().item() < 0.5
    auto = SamplerSettings(guidance=GuidanceConfig(kind="autoguidance", scale=1.5))
    assert generator.sample(torch.tensor([0]), [0], auto, 0).isfinite().all()  # its guide: velocity


def test_the_stochastic_solver_draws_by_index_and_without_churn_is_euler(
    outputs: dict[str, StageOutput],
) -> None:
    generator = load_generator(outputs)
    labels = torch.tensor([0, 1, 2])
    stochastic = replace(SETTINGS, sampler="sde", num_grid_points=6)
    together = generator.sample(labels, [4, 5, 6], stochastic, 0)
    alone = generator.sample(labels[1:2], [5], stochastic, 0)
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)
    euler = generator.sample(labels, [4, 5, 6], replace(stochastic, sampler="euler"), 0)
    assert not torch.allclose(together, euler, atol=1e-2)
    still = generator.sample(labels, [4, 5, 6], replace(stochastic, churn=0.0), 0)
    torch.testing.assert_close(still, euler, atol=1e-5, rtol=1e-5)


def test_every_way_of_sampling_has_its_own_scale_and_interval() -> None:
    evaluate = EvaluateJob(
        cfg_scale=2.0,
        autoguidance_scale=1.42,
        guidances=("unguided", "internal"),
        sampler="sde",
        sde_churn=0.5,
    )
    internal = sampler_settings("internal", evaluate)
    assert internal.guidance == GuidanceConfig(kind="internal", scale=1.78, t_min=0.1)
    assert (internal.sampler, internal.churn) == ("sde", 0.5)
    assert sampler_settings("cfg", evaluate).guidance == GuidanceConfig(kind="cfg", scale=2.0)
    assert sampler_settings("untrained", evaluate).guidance == GuidanceConfig()
    tasks = image_tasks(evaluate, Extent(num_photos=1, num_real=1, models=("rae",)))
    kinds = {task.payload["kind"] for task in tasks}
    assert kinds == {"reconstruct", "inspect", "real", "unguided", "internal"}


def test_images_of_a_class(outputs: dict[str, StageOutput]) -> None:
    tokenizer, generator = load_tokenizer(outputs), load_generator(outputs)
    images = sample_images(tokenizer, generator, 2, num_images=3, settings=SETTINGS)
    assert images.shape == (3, 3, 32, 32)
    assert images.dtype == torch.uint8
    with pytest.raises(ValueError, match="out of range"):
        sample_images(tokenizer, generator, 3, num_images=1, settings=SETTINGS)


def test_missing_stages_are_named(outputs: dict[str, StageOutput]) -> None:
    with pytest.raises(ValueError, match="needs fusion and a decoder"):
        load_tokenizer({"fusion": outputs["fusion"]})
    with pytest.raises(ValueError, match="needs diffusion and latents"):
        load_generator({"diffusion": outputs["diffusion"]})
    only = load_tokenizer({k: outputs[k] for k in ("fusion", "decoder")})
    with pytest.raises(ValueError, match="not loaded"):
        only.decode(torch.zeros(1, 16, 16), "finetune")
