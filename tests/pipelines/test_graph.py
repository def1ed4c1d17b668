"""The flow on a real Prefect server, with stages that only write a file."""

from dataclasses import replace
from pathlib import Path

import pytest
from fake_graph import stages as fake

from drorae.store.workspace import StageOutput
from pipelines import cli, graph
from pipelines.launch import StageFailed
from pipelines.plan import Request, make_plan

pytestmark = [
    pytest.mark.usefixtures("prefect"),
    # Prefect leaves event loops and sockets to the garbage collector when its threads end.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "run_stage", graph.run_stage.with_options(retry_delay_seconds=0))


def run(workspace: Path, *overrides: str, **more: object) -> dict[str, str]:
    return graph.drorae(recipe="fake", workspace=str(workspace), overrides=list(overrides), **more)


def test_every_stage_runs_once_after_its_needs(workspace: Path) -> None:
    outputs = run(workspace)
    assert set(outputs) == {"a", "b", "c", "d", "report"}
    order = fake.built()
    assert order[:2] == ["a", "b"]
    assert order[-1] == "report"
    assert sorted(order) == ["a", "b", "c", "d", "report"]
    text = Path(outputs["report"], "report.html").read_text()
    assert "c=" in text
    run(workspace)
    assert len(fake.built()) == 5


def test_stages_without_an_edge_overlap_and_the_limit_holds(workspace: Path) -> None:
    slow = ("c.sleep_s=3", "d.sleep_s=3")
    run(workspace, *slow, jobs=2)
    times = {(e["stage"], e["event"]): e["time"] for e in fake.events()}
    assert times["c", "start"] < times["d", "done"]
    assert times["d", "start"] < times["c", "done"]


def test_a_failure_is_retried_as_a_new_attempt(workspace: Path) -> None:
    run(workspace, "b.fail_attempts=1")
    starts = [e["attempt"] for e in fake.events() if (e["stage"], e["event"]) == ("b", "start")]
    assert starts == [1, 2]


def test_a_run_builds_again_what_its_plan_says(workspace: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "0.png").write_text("x")
    run(workspace, f"a.source={photos}", "with_d=false")
    run(workspace, f"a.source={photos}", "with_d=false", force=["b"])
    assert fake.built()[4:] == ["b", "c", "report"]
    (photos / "1.png").write_text("y")
    wanted = Request(
        recipe="fake",
        workspace=str(workspace),
        overrides=(f"a.source={photos}", "with_d=false"),
    )
    plan = make_plan(wanted)
    assert plan.steps[0].reason == "a.source changed: 1 file added, 0 removed, 0 changed"
    run(workspace, *wanted.overrides)
    assert fake.built()[7:] == [step.stage for step in plan.steps]


def test_what_a_later_stage_cannot_use_ends_the_run_before_that_stage(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(full: fake.FakeJob, output: StageOutput | None, stage: str) -> None:
        if output is not None:
            raise ValueError(f"stage {stage} cannot use {output.manifest.stage}")

    table = tuple(replace(s, checks={"a": refuse}) if s.name == "d" else s for s in fake.TABLE)
    monkeypatch.setattr("pipelines.stages.STAGES", table)
    for _ in ("as soon as a is built", "when the run is planned"):
        assert cli.main(["run", "--recipe", "fake", "--workspace", str(workspace)]) == 2
        assert capsys.readouterr().err == "drorae: error: stage d cannot use a\n"
        assert fake.built() == ["a"]
    assert set(run(workspace, "with_d=false")) == {"a", "b", "c", "report"}


def test_what_a_stage_says_of_its_output_is_shown_once(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = ["warning: images lie flat"]
    table = tuple(replace(s, notes=lambda out: notes) if s.name == "b" else s for s in fake.TABLE)
    monkeypatch.setattr("pipelines.stages.STAGES", table)
    assert cli.main(["run", "--recipe", "fake", "--workspace", str(workspace)]) == 0
    assert capsys.readouterr().out.count("b: warning: images lie flat") == 1


def test_a_users_error_is_not_retried_and_the_rest_goes_on(workspace: Path) -> None:
    with pytest.raises(StageFailed, match="stage c failed: planned failure of c"):
        run(workspace, "c.fail_attempts=9", "c.user_error=true")
    events = fake.events()
    assert sum((e["stage"], e["event"]) == ("c", "start") for e in events) == 1
    assert "d" in fake.built()
    assert "report" not in fake.built()


def test_a_damaged_file_rebuilds_its_stage_alone(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run(workspace)
    next(workspace.glob("stages/b/*/out.txt")).unlink()
    assert cli.main(["run", "--recipe", "fake", "--workspace", str(workspace)]) == 0
    assert fake.built()[5:] == ["b"]
    out = capsys.readouterr().out
    assert "b: damaged: out.txt is missing" in out
    assert out.count("reused") >= 4


def test_only_from_and_force(workspace: Path) -> None:
    run(workspace)
    run(workspace, only="c", force=["c"])
    run(workspace, "d.text=new", only="d")
    run(workspace, from_stage="c", force=["report"])
    assert fake.built()[5:] == ["c", "d", "report"]


def test_a_failed_stage_is_exit_code_1_and_one_line(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", "--recipe", "fake", "--set", "a.fail_attempts=9", "--retries", "0"]
    assert cli.main([*arguments, "--workspace", str(workspace)]) == 1
    captured = capsys.readouterr()
    assert "drorae: error: stage a failed: planned failure of a (log: " in captured.err
    assert "Traceback" not in captured.err + captured.out


def test_a_users_error_is_told_once(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "--recipe", "fake", "--set", "a.fail_attempts=9"]
    arguments += ["--set", "a.user_error=true", "--workspace", str(workspace)]
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert (captured.err + captured.out).count("planned failure of a") == 1
