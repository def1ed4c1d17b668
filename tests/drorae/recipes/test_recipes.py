from typing import Any

import pytest

from drorae import recipes
from drorae.config import canonical_json, from_json, override, to_json
from drorae.data.jobs import OrderConfig
from drorae.models.dit_config import dit_preset
from drorae.recipes.ablations import ABLATIONS
from drorae.training.optim import learning_rate
from pipelines.stages import stage_keys

MAIN = ["smoke", "cifar10", "imagenet256", "imagenet256_rae", "imagenet256_raev2", "imagenet512"]
IMAGENET = [name for name in MAIN if name.startswith("imagenet")]
CHANGES = {
    "table3/rae": {"fusion.model.kind": "rae"},
    "table3/cross_attention": {"fusion.model.aggregation": "cross_attention"},
    "table3/softmax_no_beta": {
        "fusion.model.aggregation": "softmax",
        "fusion.model.incremental": False,
    },
    "table3/energy_no_beta": {"fusion.model.incremental": False},
    "table3/softmax_beta": {"fusion.model.aggregation": "softmax"},
    "table3/energy_beta": {},
    "table4/plus_decoder": {},
    "table8/h1024": {"fusion.model.expert_hidden": 1024},
    "table9/layers4": {"fusion.model.deepest_layers": 4},
}


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    found = {}
    for name, part in value.items():
        found |= leaves(part, f"{path}.{name}".lstrip("."))
    return found


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_survives_json_and_says_what_to_expect(name: str) -> None:
    full = recipes.get(name)
    assert full.recipe == name
    assert canonical_json(from_json(recipes.FullJob, to_json(full))) == canonical_json(full)
    text = recipes.describe(name)
    assert f"--recipe {name}" in text
    assert ("Never run at full size here" in text) == (name != "smoke")
    assert max(len(line) for line in text.splitlines()) <= 100


def test_all_rows_of_the_four_tables_are_there() -> None:
    assert recipes.names() == [*MAIN, *ABLATIONS]
    by_table = [sum(f"table{n}/" in name for name in ABLATIONS) for n in (3, 4, 8, 9)]
    assert by_table == [6, 2, 8, 12]
    assert "rFID 0.466" in recipes.describe("ablation:table9/layers9")
    assert "113.3M parameters, rFID 0.459" in recipes.describe("ablation:table8/h6144")
    with pytest.raises(ValueError, match="Did you mean ablation:table8/h1024"):
        recipes.get("ablation:table8/h1023")


@pytest.mark.parametrize("name", CHANGES)
def test_a_row_changes_what_it_says_and_shares_the_decoder(name: str) -> None:
    paper, row = recipes.get("imagenet256"), recipes.get(f"ablation:{name}")
    before, after = leaves(to_json(paper)), leaves(to_json(row))
    changed = {path: after[path] for path in after if after[path] != before[path]}
    outside = {path: v for path, v in changed.items() if path.startswith("fusion")}
    assert outside == CHANGES[name]
    keys, paper_keys = stage_keys(row), stage_keys(paper)
    assert [keys[stage] for stage in ("shard", "decoder")] == [
        paper_keys[stage] for stage in ("shard", "decoder")
    ]


def test_the_second_stages_at_256_px_share_their_latents() -> None:
    keys = [stage_keys(recipes.get(name)) for name in IMAGENET[:3]]
    assert len({key["latents"] for key in keys}) == 1
    assert len({key["diffusion"] for key in keys}) == 3
    assert ["guide" in key for key in keys] == [True, True, False]


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_is_read_in_streams_and_the_rest_is_shuffled_whole(name: str) -> None:
    expected = OrderConfig(streams=64, window_shards=4)
    full = recipes.get(name)
    assert full.shard.rows_per_shard == 1024
    assert {full.diffusion.order, full.guide.order} == {expected}
    phases = (full.decoder.train, full.fusion.train, full.finetune.train, full.control.train)
    assert {phase.order for phase in phases} == {expected}
    assert recipes.get("smoke").diffusion.order == OrderConfig()


def test_the_order_of_samples_is_part_of_the_key() -> None:
    full = recipes.get("imagenet256")
    keys, other = stage_keys(full), stage_keys(override(full, ["diffusion.order.streams=32"]))
    assert [stage for stage in keys if keys[stage] != other[stage]] == [
        *("diffusion", "evaluate", "report")
    ]


def test_streams_that_do_not_divide_the_batch_are_refused() -> None:
    full = recipes.get("imagenet256")
    for section in ("diffusion", "fusion.train"):
        with pytest.raises(ValueError, match=r"order\.streams=64 .*=96: .* set order\.streams=32"):
            override(full, [f"{section}.batch_images=96"])
    with pytest.raises(ValueError, match=r"order\.streams=0"):
        OrderConfig(streams=0)
    with pytest.raises(ValueError, match=r"order\.window_shards=-1"):
        OrderConfig(window_shards=-1)


def test_the_paper_trains_80_epochs_at_batch_256() -> None:
    stage = recipes.get("imagenet256").diffusion
    assert (stage.num_steps, stage.batch_images) == (400_320, 256)
    assert stage.model == dit_preset("DiT-DH-XL")
    assert learning_rate(stage.optim, 400_000, stage.num_steps) == 1e-4


def test_raes_rate_is_held_for_40_epochs_and_falls_until_800() -> None:
    stage = recipes.get("imagenet256_rae").diffusion
    assert stage.num_steps == 80 * 1251

    def rate(epoch: int) -> float:
        return learning_rate(stage.optim, epoch * 1251, stage.num_steps)

    assert rate(0) == rate(40) == 2e-4
    assert rate(420) == pytest.approx(1.1e-4)
    assert rate(800) == rate(1400) == pytest.approx(2e-5)


def test_raev2_predicts_clean_latents_and_guides_itself() -> None:
    full = recipes.get("imagenet256_raev2")
    assert full.diffusion.prediction == "clean"
    assert full.diffusion.model.base_head_after == 8
    assert full.evaluate.guidances == ("unguided", "internal")


def test_ways_of_sampling_that_the_generator_cannot_do_are_refused() -> None:
    with pytest.raises(ValueError, match="needs the base head"):
        override(recipes.get("smoke"), ['evaluate.guidances=["internal"]'])
    with pytest.raises(ValueError, match="needs the null class"):
        override(recipes.get("smoke"), ["diffusion.model.class_dropout_prob=0"])
    with pytest.raises(ValueError, match="at least one, each once"):
        override(recipes.get("smoke"), ['evaluate.guidances=["cfg", "cfg"]'])
