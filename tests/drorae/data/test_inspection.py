"""What `drorae inspect` finds is what stage `shard` does, on a few images."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fakes import encoded, job, make_folder, pixels, shard_output
from PIL import Image

from drorae.config import to_json
from drorae.data import sample_choice
from drorae.data.checked import Candidates
from drorae.data.contact_sheet import MAX_PICTURES, contact_sheet
from drorae.data.inspected_sample import SampledImage
from drorae.data.inspection import inspect_source
from drorae.data.readers.candidates import Listing, joined, listed
from drorae.data.sample_choice import choose_sample


def candidates_of(*tables: pa.Table, val_fraction: float = 0.0) -> Candidates:
    table = joined(tables)
    names = tuple(sorted(set(table["class_name"].to_pylist())))
    return Candidates.of(Listing(table, [], names), 0, val_fraction)


def part(name: str, classes: list[str], kind: str = "tar", rows_of_unit: int = 1) -> pa.Table:
    return listed(
        kind,
        name,
        keys=[f"{name}/{number}" for number in range(len(classes))],
        class_names=classes,
        index=np.arange(len(classes)),
        unit=np.arange(len(classes)) // rows_of_unit,
    )


def columns(candidates: Candidates, positions: np.ndarray, name: str) -> list:
    return candidates.listing.table[name].take(pa.array(positions)).to_pylist()


def test_splits_and_classes_are_those_of_the_shards(tmp_path: Path):
    source = make_folder(tmp_path / "photos", per_class=15, classes=("cat", "dog", "eel"))
    shard = job(source, val_fraction=0.3, seed=5)
    counts = shard_output(tmp_path, shard).read_json("counts.json")
    found, _ = inspect_source(shard)
    assert list(found.class_names) == counts["class_names"]
    for split in found.splits:
        assert list(split.class_rows) == counts[split.name]["class_rows"]
        assert split.images == counts[split.name]["rows"]
    assert found.images == 45


def test_a_cap_keeps_what_the_shards_keep(tmp_path: Path):
    source = make_folder(tmp_path / "photos", per_class=12, classes=("cat", "dog", "eel"))
    shard = job(source, max_train_images=7, max_val_images=2)
    counts = shard_output(tmp_path, shard).read_json("counts.json")
    found, _ = inspect_source(shard)
    for split in found.splits:
        assert split.kept == counts[split.name]["rows"]
        assert list(split.kept_rows) == counts[split.name]["class_rows"]


def test_unlabelled_validation_is_counted_apart(tmp_path: Path):
    source = make_folder(tmp_path / "photos", per_class=3)
    flat = tmp_path / "flat"
    flat.mkdir()
    for number in range(5):
        (flat / f"{number}.png").write_bytes(encoded(pixels(500 + number)))
    found, images = inspect_source(job(source, val_source=str(flat), max_val_images=2))
    train, val = found.splits
    assert (train.images, train.unlabelled, train.class_rows) == (6, 0, (3, 3))
    assert (val.images, val.kept, val.unlabelled, val.kept_rows) == (5, 2, 5, (0, 0))
    assert found.class_names == ("cat", "dog")
    assert sum(image.label == -1 for image in images) == 5
    assert [note.is_doubtful for note in found.notes].count(True) == 1


def test_the_sample_says_what_files_are_and_how_they_change(tmp_path: Path):
    root = tmp_path / "photos"
    root.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    picture = Image.fromarray(pixels(1, 40, 24))
    files = {
        "a.JPEG": encoded(picture, "JPEG", exif=turned),
        "b.JPEG": encoded(picture.convert("CMYK"), "JPEG"),
        "c.JPEG": encoded(picture.convert("L"), "PNG"),
        "d.png": encoded(Image.fromarray(pixels(2, 12, 12))),
        "e.png": b"no picture",
    }
    for name, data in files.items():
        (root / name).write_bytes(data)
    sample = inspect_source(job(root, resolution_px=16))[0].sample
    assert sample.formats == {"JPEG": 2, "PNG": 2, "unknown": 1}
    assert sample.modes == {"RGB": 2, "CMYK": 1, "L": 1}
    assert sample.width_px is not None
    assert sample.height_px is not None
    assert (sample.width_px.min, sample.width_px.max) == (12, 40)
    assert (sample.height_px.min, sample.height_px.max) == (12, 40)  # upright
    assert (sample.turned, sample.upscaled) == (1, 1)
    ((key, reason),) = sample.rejects
    assert key == "e.png"
    assert reason.startswith("not an image")


def test_sampled_squares_are_the_pictures_of_the_shards(tmp_path: Path):
    source = make_folder(tmp_path / "photos", per_class=3)
    shard = job(source, val_fraction=0.0, resolution_px=16)
    output = shard_output(tmp_path, shard)
    names = output.names("train/part-", ".arrow")
    tables = [pa.ipc.open_file(pa.memory_map(str(output.local(n)))).read_all() for n in names]
    kept = {row["key"]: row for table in tables for row in table.to_pylist()}
    _, images = inspect_source(shard)
    assert {image.key for image in images} == set(kept)
    for image in images:
        assert image.label == kept[image.key]["label"]
        square = Image.open(io.BytesIO(kept[image.key]["image"]))
        np.testing.assert_array_equal(np.asarray(image.square), np.asarray(square))


def test_a_sample_is_spread_over_classes_and_containers():
    names = [f"class{number:02d}" for number in range(20)]
    candidates = candidates_of(*(part(f"{shard:02d}.tar", names * 3) for shard in range(20)))
    positions = choose_sample(candidates, 20)
    assert len(set(columns(candidates, positions, "class_name"))) == 20
    containers = columns(candidates, positions, "container")
    assert len(set(containers)) >= 10
    assert len(set(positions.tolist())) == 20


def test_a_sample_holds_rare_classes_and_both_splits():
    candidates = candidates_of(
        part("a.tar", ["common"] * 500 + ["rare"] * 3), part("b.tar", ["common"] * 500)
    )
    names = columns(candidates, choose_sample(candidates, 6), "class_name")
    assert names.count("rare") >= 2
    split = candidates_of(part("a.tar", ["one"] * 400), val_fraction=0.05)
    assert set(choose_sample(split, 4)) & set(split.orders["val"].tolist())


def test_a_sample_does_not_depend_on_what_else_the_source_holds_before_it():
    first = candidates_of(part("a.tar", ["x", "y"] * 20))
    second = candidates_of(part("a.tar", ["x", "y"] * 20))
    np.testing.assert_array_equal(choose_sample(first, 9), choose_sample(second, 9))


def test_of_parquet_a_few_row_groups_are_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sample_choice, "MAX_GROUP_ROWS", 300)
    tables = [part(f"{n}.parquet", ["x"] * 1000, "parquet", rows_of_unit=100) for n in range(3)]
    candidates = candidates_of(*tables)
    positions = choose_sample(candidates, 64)
    places = zip(
        columns(candidates, positions, "container"),
        columns(candidates, positions, "unit"),
        strict=True,
    )
    assert len(positions) == 64
    assert len(set(places)) == 3


def test_one_row_group_is_read_however_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(sample_choice, "MAX_GROUP_ROWS", 2)
    images = [encoded(pixels(number)) for number in range(8)]
    pq.write_table(
        pa.table({"image": images, "label": [0, 1] * 4}), tmp_path / "a.parquet", row_group_size=4
    )
    _, looked = inspect_source(job(tmp_path / "a.parquet"))
    assert len(looked) == 4
    assert not any(image.reason for image in looked)


def test_an_inspection_is_json(tmp_path: Path):
    found, _ = inspect_source(job(make_folder(tmp_path / "photos")))
    parsed = json.loads(json.dumps(to_json(found)))
    assert parsed["splits"][0]["name"] == "train"
    assert parsed["places"] == [{"kind": "file", "containers": 1, "images": 8}]


@pytest.mark.parametrize(
    "text", ["猫", "\udcff", "two\nlines", "", "x" * 500, "\x1b[31m", "é" * 300, "\ufeff"]
)
def test_a_sheet_takes_any_text(text: str):
    images = [
        SampledImage(
            key=text,
            split="val",
            label=0,
            square=Image.new("RGB", (8, 8)),
        ),
        SampledImage(key=text, split="train", label=-1, reason=text),
    ]
    with Image.open(io.BytesIO(contact_sheet(images, [text], text))) as sheet:
        assert sheet.format == "PNG"
        assert sheet.width == 1200


def test_a_sheet_groups_classes_and_shows_the_pictures():
    colours = ["#ff0000", "#00ff00"]
    images = [
        SampledImage(
            key=f"{number}", split="train", label=number % 2, square=_plain(colours[number % 2])
        )
        for number in range(60)
    ]
    data = contact_sheet(images, ["red", "green"], "title")
    sheet = np.asarray(Image.open(io.BytesIO(data)))
    is_red = (sheet == [255, 0, 0]).all(axis=2).any(axis=1)
    is_green = (sheet == [0, 255, 0]).all(axis=2).any(axis=1)
    assert np.flatnonzero(is_red).max() < np.flatnonzero(is_green).min()
    assert MAX_PICTURES == 48
    assert (sheet == [0, 255, 0]).all(axis=2).sum() == 24 * 128**2  # 16 px enlarged eight times


def _plain(colour: str) -> Image.Image:
    return Image.new("RGB", (16, 16), colour)


def test_a_sheet_of_nothing_is_a_picture():
    with Image.open(io.BytesIO(contact_sheet([], [], "nothing"))) as sheet:
        assert sheet.height > 0
