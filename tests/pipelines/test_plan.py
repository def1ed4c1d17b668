import json
from dataclasses import replace
from pathlib import Path

import pytest
from fake_graph import stages as fake

from drorae.store.context import StageContext
from drorae.store.stage_run import run_once
from drorae.store.workspace import Workspace
from pipelines import code_version, stages
from pipelines.plan import Request, default_workspace, make_plan
from pipelines.sources import keep, look


def build_all(workspace: Path, full: fake.FakeJob, **fields: object) -> None:
    """Build every stage of the fake graph in this process."""
    store, sources = Workspace(str(workspace)), look(full, [])
    keys = stages.stage_keys(full, fake.TABLE, sources)
    keep(sources.values(), store)
    for stage in stages.enabled_stages(full, fake.TABLE):
        inputs = {name: keys[name] for name in stages.needs_of(full, stage, keys)}
        ctx = StageContext(
            stage=stage.name,
            key=keys[stage.name],
            output_uri=store.stage_uri(stage.name, keys[stage.name]),
            inputs={name: store.find(name, key) for name, key in inputs.items()},
        )
        run = getattr(fake, f"run_{stage.name}")
        given = {
            "version": stage.version,
            "config": stages.section_json(full, stage)
            | {stages.SOURCES: stages.source_digests(full, stage, sources)},
            "input_keys": inputs,
            "code_digest": code_version.entry_digest(stage.entry),
        }
        run_once(
            store,
            stage.name,
            ctx.key,
            lambda ctx=ctx, run=run, s=stage: run(ctx, **stages.section_values(full, s)),
            manifest_fields=given | fields,
        )


def states(request: Request) -> dict[str, str]:
    return {step.stage: step.state for step in make_plan(request).steps}


@pytest.fixture
def request_(workspace: Path) -> Request:
    return Request(recipe="fake", workspace=str(workspace))


def test_an_empty_workspace_has_nothing(request_: Request) -> None:
    plan = make_plan(request_)
    assert all(step.must_run and step.reason == "never built here" for step in plan.steps)
    assert not plan.is_complete


def test_what_is_built_is_present(request_: Request, workspace: Path) -> None:
    build_all(workspace, fake.FakeJob())
    plan = make_plan(request_)
    assert plan.is_complete
    assert plan.steps[0].metrics == {"fake/steps": 10.0}
    assert plan.steps[0].expected_wall_s is not None


def test_a_change_says_which_field_and_what_depends_on_it(
    request_: Request, workspace: Path
) -> None:
    build_all(workspace, fake.FakeJob())
    plan = make_plan(replace(request_, overrides=("c.text=new",)))
    steps = {step.stage: step for step in plan.steps}
    assert steps["c"].reason == "c.text 'x' -> 'new'"
    assert steps["report"].reason == "an input changed"
    assert not steps["b"].must_run


def test_a_raised_version_is_the_reason(
    request_: Request, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_all(workspace, fake.FakeJob())
    table = (replace(fake.TABLE[0], version=2), *fake.TABLE[1:])
    monkeypatch.setattr(stages, "STAGES", table)
    assert make_plan(request_).steps[0].reason == "stage version 1 -> 2"


def test_a_damaged_file_is_named_and_only_its_stage_runs(
    request_: Request, workspace: Path
) -> None:
    build_all(workspace, fake.FakeJob())
    next(workspace.glob("stages/b/*/out.txt")).unlink()
    steps = {step.stage: step for step in make_plan(request_).steps}
    assert steps["b"].state == "damaged"
    assert "out.txt is missing" in steps["b"].reason
    assert [name for name, step in steps.items() if step.must_run] == ["b"]


def test_unfinished_work_is_seen(request_: Request, workspace: Path) -> None:
    key = make_plan(request_).keys["a"]
    checkpoint = workspace / "stages" / "a" / key / "_work" / "checkpoint"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("3")
    assert states(request_)["a"] == "unfinished"


def test_only_leaves_out_the_others(request_: Request, workspace: Path) -> None:
    build_all(workspace, fake.FakeJob())
    plan = make_plan(replace(request_, only="c", force=("c",)))
    assert [step.stage for step in plan.steps if step.selected] == ["c"]
    assert [step.stage for step in plan.steps if step.must_run] == ["c"]


def test_from_takes_what_depends_on_it(request_: Request, workspace: Path) -> None:
    build_all(workspace, fake.FakeJob())
    plan = make_plan(replace(request_, from_stage="c"))
    assert [step.stage for step in plan.steps if step.selected] == ["c", "report"]


def test_only_without_its_inputs_is_an_error(request_: Request) -> None:
    with pytest.raises(ValueError, match="stage c reads the output of b, which is missing"):
        make_plan(replace(request_, only="c"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only": "x"}, "unknown stage 'x'"),
        ({"only": "c", "from_stage": "b"}, "at most one"),
        ({"only": "c", "force": ("a",)}, "leaves out"),
        ({"only": "d", "overrides": ("with_d=false",)}, "switched off"),
        ({"recipe": "other"}, "is no recipe"),
        ({"overrides": ("c.txt=1",)}, "c.text"),
    ],
)
def test_a_wrong_wish_is_one_clear_error(
    request_: Request, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(replace(request_, **changes))


def test_other_code_is_shown_and_rebuilds_only_when_asked(
    request_: Request, workspace: Path
) -> None:
    build_all(workspace, fake.FakeJob(), code_digest="other")
    plan = make_plan(request_)
    assert plan.is_complete
    assert all(step.code_changed for step in plan.steps)
    strict = make_plan(replace(request_, strict_code=True))
    assert all(step.state == "code changed" for step in strict.steps)


def test_strict_code_rebuilds_what_depends_on_changed_code(
    request_: Request, workspace: Path
) -> None:
    build_all(workspace, fake.FakeJob())
    manifest = next(workspace.glob("stages/c/*/manifest.json"))
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"code_digest": "other"}))
    plan = make_plan(replace(request_, strict_code=True))
    assert [step.stage for step in plan.steps if step.must_run] == ["c", "report"]


@pytest.mark.parametrize(
    ("force", "again"), [("a", ["a", "b", "c", "d", "report"]), ("c", ["c", "report"])]
)
def test_what_follows_a_forced_stage_is_built_again(
    request_: Request, workspace: Path, force: str, again: list[str]
) -> None:
    build_all(workspace, fake.FakeJob())
    plan = make_plan(replace(request_, force=(force,)))
    assert [step.stage for step in plan.steps if step.must_run] == again
    reasons = {step.stage: step.reason for step in plan.steps}
    assert reasons[force] == "asked for by --force"
    assert "is built again by --force" in reasons["report"]


def test_what_follows_a_forced_stage_through_a_missing_one_is_built_again(
    request_: Request, workspace: Path
) -> None:
    build_all(workspace, fake.FakeJob())
    next(workspace.glob("stages/b/*/manifest.json")).unlink()
    plan = make_plan(replace(request_, force=("a",)))
    found = {step.stage: step.state for step in plan.steps}
    assert (found["b"], found["c"]) == ("missing", "forced")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_text(f"content {number}")
    return folder


def with_source(request: Request, source: str | Path) -> Request:
    return replace(request, overrides=(f"a.source={source}",))


def test_a_changed_source_is_told_with_its_counts(
    request_: Request, workspace: Path, photos: Path
) -> None:
    build_all(workspace, fake.FakeJob(a=fake.FakeStage(source=str(photos))))
    request = with_source(request_, photos)
    assert make_plan(request).is_complete
    (photos / "0.png").unlink()
    (photos / "1.png").write_text("other")
    for name in ("x.png", "y.png"):
        (photos / name).write_text(name)
    steps = {step.stage: step for step in make_plan(request).steps}
    assert steps["a"].reason == "a.source changed: 2 files added, 1 removed, 1 changed"
    assert all(step.must_run for step in steps.values())


def test_the_same_source_from_another_folder_is_reused(
    request_: Request, workspace: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_all(workspace, fake.FakeJob(a=fake.FakeStage(source=str(photos))))
    monkeypatch.chdir(photos.parent)
    assert make_plan(with_source(request_, "photos")).is_complete
    monkeypatch.chdir(photos)
    assert make_plan(with_source(request_, "../photos")).is_complete
    photos.rename(photos.parent / "moved")
    assert make_plan(with_source(request_, photos.parent / "moved")).is_complete


def test_a_source_that_was_deleted_after_its_use_is_as_it_was(
    request_: Request, workspace: Path, photos: Path
) -> None:
    build_all(workspace, fake.FakeJob(a=fake.FakeStage(source=str(photos))))
    photos.rename(photos.parent / "moved")
    assert make_plan(with_source(request_, photos)).is_complete
    assert not make_plan(with_source(request_, photos.parent / "other")).is_complete


def test_a_run_looks_at_its_sources_once(request_: Request, photos: Path) -> None:
    first = make_plan(with_source(request_, photos))
    (photos / "late.png").write_text("x")
    assert make_plan(with_source(request_, photos), first.sources).keys == first.keys
    assert make_plan(with_source(request_, photos)).keys["a"] != first.keys["a"]


def test_reading_commands_take_a_source_as_it_was_used(
    request_: Request, workspace: Path, photos: Path
) -> None:
    build_all(workspace, fake.FakeJob(a=fake.FakeStage(source=str(photos))))
    (photos / "late.png").write_text("x")
    assert make_plan(with_source(request_, photos), reads_only=True).is_complete


def test_the_same_configuration_has_the_same_run_key(request_: Request) -> None:
    changed = replace(request_, overrides=("c.text=new",))
    assert make_plan(request_).run_key == make_plan(request_).run_key
    assert make_plan(request_).run_key != make_plan(changed).run_key


def test_the_workspace_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DRORAE_WORKSPACE", raising=False)
    assert default_workspace() == "runs"
    monkeypatch.setenv("DRORAE_WORKSPACE", "s3://bucket/prefix")
    assert default_workspace() == "s3://bucket/prefix"


def test_code_of_a_stage_is_what_its_module_imports() -> None:
    names = {path.name for path in code_version.source_files("drorae.store.workspace")}
    assert {"workspace.py", "files.py", "manifest.py"} <= names
    assert "stage_run.py" not in names


def test_an_entry_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot be found"):
        code_version.source_files("no_such_package.module")
    with pytest.raises(ValueError, match="no source file"):
        code_version.source_files("drorae.no_such_module")
