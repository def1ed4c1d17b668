import json
from pathlib import Path

import pytest
from fake_graph import stages as fake
from test_plan import build_all

from pipelines import cli


def drorae(workspace: Path, *arguments: str) -> int:
    return cli.main([*arguments, "--workspace", str(workspace)])


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_everything_reused_ends_with_the_table_and_the_report(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_all(workspace, fake.FakeJob())
    assert drorae(workspace, "run", "--recipe", "fake") == 0
    out = capsys.readouterr().out
    assert out.count(" reused ") == 5
    assert "report.html" in out.splitlines()[-1]
    assert not (workspace / "prefect").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--recipe", "nope"], "'nope' is no recipe"),
        (["run", "--recipe", "fake", "--set", "c.txt=1"], "Close matches: c.text"),
        (["plan", "--recipe", "fake", "--only", "x"], "unknown stage 'x'"),
        (["report", "--recipe", "fake"], "the report of recipe fake is missing"),
        (["reconstruct", "nothing.jpg", "--recipe", "fake"], "nothing.jpg does not exist"),
        (["reconstruct", __file__, "--recipe", "fake", "--out", "/no/a.png"], "cannot be written"),
        (["sample", "--class", "0", "--recipe", "fake", "--out", "/no/a.png"], "cannot be written"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(
    workspace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert drorae(workspace, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("drorae: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert "Traceback" not in captured.err + captured.out


def test_a_workspace_that_is_a_file_is_an_error(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.write_text("")
    assert drorae(workspace, "run", "--recipe", "fake") == 2
    assert "is a file" in capsys.readouterr().err


def test_plan_says_what_and_why(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_all(workspace, fake.FakeJob())
    assert drorae(workspace, "plan", "--recipe", "fake", "--set", "c.text=new") == 0
    out = capsys.readouterr().out
    assert "c.text 'x' -> 'new'" in out
    assert "2 stages to run" in out


def test_plan_as_json(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert drorae(workspace, "plan", "--recipe", "fake", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in plan["stages"]] == ["a", "b", "c", "d", "report"]
    assert all(stage["must_run"] for stage in plan["stages"])


def test_plan_shows_changed_code(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_all(workspace, fake.FakeJob(), code_digest="other")
    assert drorae(workspace, "plan", "--recipe", "fake", "--only", "c") == 0
    out = capsys.readouterr().out
    assert "code changed since" in out
    assert "leave out" in out


def test_status_verifies_and_names_what_is_damaged(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_all(workspace, fake.FakeJob())
    assert drorae(workspace, "status", "--verify") == 0
    file = next(workspace.glob("stages/b/*/out.txt"))
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    assert drorae(workspace, "status") == 0
    assert drorae(workspace, "status", "--verify") == 1
    assert "out.txt: sha256 differs" in capsys.readouterr().out
    assert drorae(workspace, "status", "--verify", "--json") == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["stage"] for row in rows if row["problems"]] == ["b"]


def test_status_of_nothing(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert drorae(workspace, "status") == 0
    assert "no output in" in capsys.readouterr().out


def test_report_prints_its_path(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_all(workspace, fake.FakeJob())
    assert drorae(workspace, "report", "--recipe", "fake") == 0
    assert Path(capsys.readouterr().out.strip()).read_bytes()


def test_recipes_are_listed_and_shown(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", "list"]) == 0
    assert "A fake recipe." in capsys.readouterr().out
    assert cli.main(["recipes", "show", "fake", "--set", "c.text=new"]) == 0
    out = capsys.readouterr().out
    assert "c.text" in out
    assert "Written into the output." in out
    assert cli.main(["recipes", "show", "fake", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "fake"


def test_assets_are_listed(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRORAE_ASSETS", str(workspace))
    assert cli.main(["assets", "list"]) == 0
    assert "cifar10" in capsys.readouterr().out
    assert cli.main(["assets", "fetch", "unknown"]) == 2


@pytest.mark.parametrize("arguments", [["run", "--jobs", "0"], ["sample"], []])
def test_wrong_options_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
