"""`drorae inspect`: exit codes, text, JSON, the sheet, remote places, fit to a recipe."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.spec import AbstractFileSystem
from PIL import Image

from pipelines import cli, inspect_command


@pytest.fixture(autouse=True)
def _width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def picture(path: Path, seed: int = 0, side_px: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (side_px, side_px, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes with 3, 4 and 5 images."""
    for label, name in enumerate(("cat", "dog", "eel")):
        for number in range(3 + label):
            picture(tmp_path / "photos" / name / f"{number}.png", 10 * label + number)
    return tmp_path / "photos"


def inspect(*words: object) -> int:
    return cli.main(["inspect", *map(str, words)])


def inspect_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    assert inspect(*words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_text_fits_a_terminal_and_says_what_is_there(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect(photos, "--set", "shard.resolution_px=64", "--set", "val_fraction=0.4") == 2
    assert "no configuration path" in capsys.readouterr().err
    assert inspect(photos, "--set", "shard.resolution_px=64") == 0
    captured = capsys.readouterr()
    assert max(len(line) for line in captured.out.splitlines()) <= 100
    assert captured.err == ""
    for text in (
        "images   12",
        "1 image folder (12 images)",
        "shard.val_fraction=0.02, by hash",
        "    2  eel",
        "PNG 12",
        "12 with a side below shard.resolution_px=64",
        "! shard.val_fraction=0.02 of 12 images leaves no validation image",
    ):
        assert text in captured.out


def test_doubtful_decisions_are_marked_and_counted(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "mixed"
    picture(root / "preview.png", 77)
    with tarfile.open(root / "all.tar", "w") as archive:
        archive.add(photos, ".")
    found = inspect_json(capsys, root)
    doubtful = [note["text"] for note in found["notes"] if note["is_doubtful"]]
    assert any("1 pictures lie beside 1 containers" in text for text in doubtful)
    assert found["images"] == 12
    assert found["num_rejects"] == 1
    assert inspect(root) == 0
    out = capsys.readouterr().out
    assert f"decided by the readers: {len(found['notes'])}, doubtful (!): {len(doubtful)}" in out
    assert sum(line.startswith("! ") for line in out.splitlines()) >= len(doubtful)
    assert "entries that cannot be listed: 1" in out
    assert "preview.png: lies beside containers" in out


def test_json_has_all_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for label in range(30):
        picture(tmp_path / "many" / f"class{label:02d}" / "a.png", label)
    found = inspect_json(capsys, tmp_path / "many", "--images", 7)
    assert found["class_names"] == [f"class{label:02d}" for label in range(30)]
    assert sum(found["splits"][0]["class_rows"]) + sum(found["splits"][1]["class_rows"]) == 30
    assert found["sample"]["images"] == 7
    assert inspect(tmp_path / "many") == 0
    out = capsys.readouterr().out
    assert "21 more (all with --json)" in out
    assert "class05" in out
    assert "class06" not in out
    assert "class27" in out


def test_only_a_named_sheet_is_written(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    place = tmp_path / "empty"
    place.mkdir()
    monkeypatch.chdir(place)
    assert inspect(photos) == 0
    assert list(place.iterdir()) == []
    capsys.readouterr()
    assert inspect(photos, "--sheet", "sheet.png") == 0
    assert "contact sheet: sheet.png" in capsys.readouterr().out
    with Image.open(place / "sheet.png") as sheet:
        assert sheet.format == "PNG"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/no/such/folder"], "source '/no/such/folder' does not exist"),
        ([], "no source is given"),
        (["memory://nothing-here"], "does not exist or is empty"),
        (["nope://bucket/folder"], "nope"),
        (["asset:nope"], "unknown"),
        ([".", "--recipe", "nope"], "is no recipe"),
        ([".", "--sheet", "/no/a.png"], "--sheet /no/a.png cannot be written"),
        ([".", "--val-source", "/no/val", "--set", "shard.crop=left"], "shard.crop"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert inspect(*words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("drorae: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""


def test_no_image_at_all_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no picture")
    assert inspect(tmp_path / "texts") == 2
    assert "holds no image" in capsys.readouterr().err


def test_val_source_is_the_validation_split(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat", "dog", "eel"):
        picture(tmp_path / "held" / name / "a.png", 99)
    found = inspect_json(capsys, photos, "--val-source", tmp_path / "held")
    assert [split["images"] for split in found["splits"]] == [12, 3]
    assert found["split_by"] == "shard.val_source"
    assert found["val_source"] == str(tmp_path / "held")


def test_a_recipe_says_whether_the_data_fit_it(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (photos, "--recipe", "smoke", "--set", "shard.val_fraction=0.5")
    found = inspect_json(capsys, *words)
    (classes, evaluated) = found["problems"][-2:]
    assert "3 classes (cat, dog, eel), but diffusion.model.num_classes=10" in classes
    assert "evaluate.num_val_images" in evaluated
    assert inspect(*words) == 0
    assert "recipe smoke: does not fit" in capsys.readouterr().out
    fitting = ("diffusion.model.num_classes=3", "guide.model.num_classes=3")
    sets = [word for text in (*fitting, "evaluate.num_val_images=2") for word in ("--set", text)]
    assert inspect_json(capsys, *words, *sets)["problems"] == []


def test_a_cap_that_leaves_classes_out_is_a_problem_of_the_recipe(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ("shard.val_fraction=0.5", "shard.max_train_images=1", "diffusion.model.num_classes=3")
    words = [word for text in sets for word in ("--set", text)]
    problems = inspect_json(capsys, photos, "--recipe", "smoke", *words)["problems"]
    assert any("2 of 3 classes have no training image" in problem for problem in problems)


def test_the_source_of_a_recipe_is_inspected(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect("--recipe", "smoke", "--set", "shard.source=/no/such/place") == 2
    assert "'/no/such/place' does not exist" in capsys.readouterr().err


def test_remote_places_are_listed_and_sampled(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(photos), "/inspected", recursive=True)
    try:
        here = inspect_json(capsys, photos)
        there = inspect_json(capsys, "memory://inspected")
    finally:
        memory.rm("/inspected", recursive=True)
    for name in ("class_names", "splits", "sample", "images"):
        assert there[name] == here[name]


class Hub(AbstractFileSystem):
    """A stand-in for the Hub: paths begin without a slash, as those of `HfFileSystem`."""

    protocol: ClassVar[str] = "hf"  # pyright: ignore[reportIncompatibleVariableOverride]
    content: ClassVar[dict[str, bytes]] = {}

    def ls(self, path: str, detail: bool = True, **_: object) -> list:
        path = str(self._strip_protocol(path))
        inside = [name.removeprefix(f"{path}/") for name in self.content if name.startswith(path)]
        if not inside:
            raise FileNotFoundError(path)
        children = sorted({name.partition("/")[0] for name in inside})
        names = [path] if path in self.content else [f"{path}/{child}" for child in children]
        return [self._entry(name) for name in names] if detail else names

    def _entry(self, name: str) -> dict:
        is_file = name in self.content
        size = len(self.content[name]) if is_file else 0
        return {"name": name, "size": size, "type": "file" if is_file else "directory"}

    def open(self, path: str, *_: object, **__: object) -> io.BytesIO:  # pyright: ignore[reportIncompatibleMethodOverride]
        return io.BytesIO(self.content[path])


class DeadHub(Hub):
    """One that answers with an error of its own."""

    def ls(self, path: str, detail: bool = True, **_: object) -> list:
        raise NameError("no route to the hub")


class LostHub(Hub):
    """One that lists its files and then is away."""

    def open(self, path: str, *_: object, **__: object) -> io.BytesIO:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NameError("no route to the hub")


@pytest.fixture
def hub() -> Iterator[Callable[[type[Hub]], None]]:
    """Puts a stand-in where hf:// is read from."""
    real = fsspec.get_filesystem_class("hf")
    yield lambda stand_in: fsspec.register_implementation("hf", stand_in, clobber=True)
    fsspec.register_implementation("hf", real, clobber=True)


def test_parquet_of_the_hub_is_inspected(
    photos: Path, hub: Callable[[type[Hub]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    hub(Hub)
    Hub.content = {"datasets/some/one/README.md": b"text"}
    for split, count in (("train", 8), ("test", 4)):
        images = [{"bytes": path.read_bytes()} for path in sorted(photos.rglob("*.png"))[:count]]
        table = pa.table({"image": images, "label": [number % 2 for number in range(count)]})
        sink = io.BytesIO()
        pq.write_table(table, sink)
        Hub.content[f"datasets/some/one/data/{split}-00000-of-00001.parquet"] = sink.getvalue()
    found = inspect_json(capsys, "hf://datasets/some/one", "--sheet", photos / "sheet.png")
    assert found["class_names"] == ["0", "1"]
    assert [split["images"] for split in found["splits"]] == [8, 4]
    assert found["split_by"] == "the source"
    assert found["sample"]["formats"] == {"PNG": 12}
    assert found["reject_reasons"] == {"not an image by its name": 1}
    assert (photos / "sheet.png").exists()


@pytest.mark.parametrize("stand_in", [DeadHub, LostHub])
def test_a_store_that_does_not_answer_is_one_line_and_no_fault_of_images(
    stand_in: type[Hub], hub: Callable[[type[Hub]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    hub(stand_in)
    stand_in.content = {f"datasets/some/one/cat/{n}.png": b"never read" for n in range(3)}
    assert inspect("hf://datasets/some/one") == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "no route to the hub" in captured.err
    assert "HF_TOKEN" in captured.err


def test_a_long_listing_says_on_stderr_how_far_it_is(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect_command, "LINE_EVERY_S", 0.0)
    assert inspect(photos, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["images"] == 12
    assert "listing: 3 of 3" in captured.err


def test_names_cannot_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "odd" / "\x1b[31mred[bold]" / "a\nb.png")
    (tmp_path / "odd" / "\x1b[31mred[bold]" / "\x07.png").write_bytes(b"")
    assert inspect(tmp_path / "odd") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert r"\x1b[31mred[bold]" in out
