import dataclasses
from typing import Any

import pytest

from drorae import recipes
from drorae.models.dit_config import DiTConfig
from drorae.recipes.full import FullJob
from drorae.recipes.imagenet_tokenizer import TokenizerSections, imagenet_sections
from drorae.training.schedule import in_steps, schedule_record

TRAIN_IMAGES = 1_281_167


def whole(sections: TokenizerSections) -> FullJob:
    smoke, grid = recipes.get("smoke"), sections["encoder"].grid
    dit = DiTConfig(input_size=grid, in_channels=768)
    stages = {n: dataclasses.replace(getattr(smoke, n), model=dit) for n in ("diffusion", "guide")}
    return FullJob(recipe="x", **sections, **stages)


@pytest.mark.parametrize("image_px", [256, 512])
@pytest.mark.parametrize("source", ["drorae", "rae"])
def test_sections_make_a_consistent_configuration(image_px: Any, source: Any) -> None:
    full = whole(imagenet_sections(image_px, source))
    assert full.encoder.input_px == {256: 224, 512: 448}[image_px]
    assert full.decoder.model.image_px == full.shard.resolution_px == image_px
    assert full.shard.view_px == int(1.5 * image_px)
    assert full.shard.pictures == "source"
    assert full.decoder.train.view == "random_crop"
    assert full.shard.duplicates == "keep"


def test_the_papers_phases_have_its_lengths_and_starts() -> None:
    sections = imagenet_sections()
    found = {}
    for name in ("decoder", "fusion", "finetune"):
        train = in_steps(sections[name].train, TRAIN_IMAGES)
        record = schedule_record(train, TRAIN_IMAGES)
        found[name] = (record["length_epochs"], record["gan_start_steps"])
        assert (train.batch_images, train.optim.lr, train.optim.betas) == (256, 1e-4, (0.5, 0.9))
        assert (train.optim.weight_decay, train.optim.warmup_steps) == (0.05, 5004)
        assert train.ema_decay == 0.9978
    assert found == {"decoder": (100, 30_000), "fusion": (100, 10_000), "finetune": (20, 30_000)}
    # drorae-paper: 30k and 10k steps at batch 256 are 6.0 and 2.0 epochs
    record = schedule_record(sections["decoder"].train, TRAIN_IMAGES)
    assert record["gan_start_epochs"] == pytest.approx(6.0, abs=0.01)


def test_raes_stage_1_has_its_lengths_and_starts() -> None:
    sections = imagenet_sections(source="rae")
    train = in_steps(sections["decoder"].train, TRAIN_IMAGES)
    record = schedule_record(train, TRAIN_IMAGES)
    assert record["steps_per_epoch"] == 2502
    assert (record["length_epochs"], record["gan_start_epochs"]) == (16, 8)
    assert record["discriminator_start_epochs"] == 6
    assert (train.batch_images, train.optim.lr, train.optim.final_lr) == (512, 2e-4, 2e-5)
    assert (train.optim.betas, train.optim.weight_decay) == ((0.9, 0.95), 0.0)
    assert sections["fusion"].model.kind == "rae"


def test_crops_without_whole_images_and_foreign_pixel_statistics_are_refused() -> None:
    sections = imagenet_sections()
    plain = dataclasses.replace(sections["shard"], view_px=None)
    with pytest.raises(ValueError, match=r"shard\.view_px, for example 384"):
        whole({**sections, "shard": plain})
    half = (0.5, 0.5, 0.5)
    siglip = dataclasses.replace(sections["encoder"], image_mean=half, image_std=half)
    with pytest.raises(ValueError, match=r"decoder\.model\.image_mean"):
        whole({**sections, "encoder": siglip})
