import pytest
from fake_graph import stages as fake

from pipelines import stages
from pipelines.stages import Stage


def stage(name: str, *needs: str) -> Stage:
    return Stage(name=name, needs=needs, sections=(), entry="x:y")


def test_the_product_graph_is_in_topological_order_and_complete() -> None:
    names = [s.name for s in stages.topological(stages.STAGES)]
    assert names == [s.name for s in stages.STAGES]
    assert names[0] == "shard"
    assert names[-1] == "report"


def test_finetune_runs_beside_latents_and_diffusion() -> None:
    assert not {"latents", "diffusion", "guide"} & stages.descendants("finetune", stages.STAGES)
    assert "finetune" not in stages.find_stage("latents").needs


def test_the_longest_chain_goes_first_beside_finetune() -> None:
    lengths = {s.name: stages.chain_length(s.name, stages.STAGES) for s in stages.STAGES}
    assert lengths["fusion"] > lengths["control"]
    assert lengths["latents"] > lengths["finetune"]
    assert lengths["report"] == 1


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ((stage("a"), stage("a")), "not unique"),
        ((stage("a", "z"),), "needs \\['z'\\]"),
        ((stage("a", "b"), stage("b", "a")), "form a cycle"),
    ],
)
def test_a_broken_table_is_refused(table: tuple[Stage, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stages.topological(table)


def test_order_follows_needs_not_the_table() -> None:
    table = (stage("c", "b"), stage("a"), stage("b", "a"))
    assert [s.name for s in stages.topological(table)] == ["a", "b", "c"]


def test_a_key_changes_with_its_section_and_everything_downstream() -> None:
    before = stages.stage_keys(fake.FakeJob(), fake.TABLE)
    after = stages.stage_keys(fake.FakeJob(c=fake.FakeStage(text="y")), fake.TABLE)
    assert {n for n in before if before[n] != after[n]} == {"c", "report"}


def test_a_disabled_stage_has_no_key_and_changes_only_its_users() -> None:
    before = stages.stage_keys(fake.FakeJob(), fake.TABLE)
    after = stages.stage_keys(fake.FakeJob(with_d=False), fake.TABLE)
    assert "d" not in after
    assert {n for n in after if before[n] != after[n]} == {"report"}


def test_an_unknown_stage_lists_close_matches() -> None:
    with pytest.raises(ValueError, match="did you mean finetune"):
        stages.find_stage("finetun")


@pytest.mark.parametrize("row", stages.STAGES, ids=lambda row: row.name)
def test_no_driver_needs_a_gpu_and_all_networks_run_on_one(row: Stage) -> None:
    assert row.driver.gpus == 0
    assert row.workers.gpus == 0 or row.name != "shard"
