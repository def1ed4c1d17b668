import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from data_fakes import committed, context, encoded, job, make_folder, pixels, shard_output
from PIL import Image

from drorae.data import sharding
from drorae.data.assets.catalog import INDEX_NAME
from drorae.data.assets.substitutes import write_sheets
from drorae.data.decoding import ImageLimits, decode_image, decode_png, to_square
from drorae.data.shard_format import PICTURE_SCHEMA, parse_index
from drorae.data.shard_map import run_in_process
from drorae.data.sharding import ShardJob, run_shard
from drorae.failure import Fatal
from drorae.store import files


def rows(output, split: str) -> list[dict]:
    names = output.names(f"{split}/part-", ".arrow")
    tables = [pa.ipc.open_file(pa.memory_map(str(output.local(n)))).read_all() for n in names]
    return [row for table in tables for row in table.to_pylist()]


def rejects(output) -> dict[str, str]:
    lines = output.local("rejects.jsonl").read_text().splitlines()
    return {json.loads(line)["key"]: json.loads(line)["reason"] for line in lines}


def digests(output) -> dict[str, str]:
    return {entry.name: entry.sha256 for entry in output.manifest.files}


def test_shards_hold_every_image_once_with_contiguous_ids(tmp_path: Path):
    source = make_folder(tmp_path / "photos", per_class=10)
    output = shard_output(tmp_path, job(source))
    train, val = rows(output, "train"), rows(output, "val")
    assert [r["id"] for r in train] == list(range(len(train)))
    assert [r["id"] for r in val] == list(range(len(val)))
    keys = {r["key"] for r in train + val}
    assert len(keys) == len(train) + len(val) == 20
    counts = output.read_json("counts.json")
    assert counts["train"]["rows"] == sum(counts["train"]["shards"]) == len(train)
    assert set(counts["train"]["shards"][:-1]) <= {3}
    assert counts["class_names"] == ["cat", "dog"]
    assert counts["resolution_px"] == 16
    assert counts["rejected"] == 0


def test_rows_keep_label_size_and_pixels_of_their_source(tmp_path: Path):
    source = make_folder(tmp_path / "photos", per_class=3)
    output = shard_output(tmp_path, job(source, val_fraction=0.0, resolution_px=18))
    for row in rows(output, "train"):
        name, number = row["key"].split("/")
        seed = 100 * ["cat", "dog"].index(name) + int(number[:3])
        assert row["label"] == ["cat", "dog"].index(name)
        assert (row["source_width"], row["source_height"]) == (20, 18)
        np.testing.assert_array_equal(decode_png(row["image"]), pixels(seed)[:, 1:19])
    shard = pa.ipc.open_file(pa.memory_map(str(output.local("train/part-00000.arrow"))))
    assert shard.schema.remove_metadata() == PICTURE_SCHEMA


def test_two_runs_write_the_same_bytes_whatever_the_chunks(tmp_path: Path, monkeypatch):
    source = make_folder(tmp_path / "photos", per_class=20)
    first = shard_output(tmp_path / "a", job(source))
    monkeypatch.setattr(sharding, "MIN_CHUNK_ROWS", 3)
    monkeypatch.setattr(sharding, "CHUNKS_PER_ROUND", 7)
    assert digests(shard_output(tmp_path / "b", job(source))) == digests(first)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_both_kinds_of_pictures_give_the_squares_of_the_evaluation_protocol(
    tmp_path: Path, image_format: str
):
    root = tmp_path / "photos"
    shapes = {"a/1": (61, 40), "a/2": (33, 70), "b/1": (16, 16), "b/2": (20, 18), "b/3": (17, 31)}
    for number, (name, (width, height)) in enumerate(shapes.items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        data = encoded(Image.fromarray(pixels(number, width, height)), image_format)
        (root / f"{name}.img.png").write_bytes(data)
    squares = shard_output(tmp_path / "square", job(root))
    sources = shard_output(tmp_path / "source", job(root, pictures="source"))
    limits = ImageLimits(**sources.read_json("counts.json")["limits"])
    for split in ("train", "val"):
        for square, source in zip(rows(squares, split), rows(sources, split), strict=True):
            assert source["image"] == (root / source["key"]).read_bytes()
            assert {**square, "image": b""} == {**source, "image": b""}
            made = to_square(decode_image(source["image"], limits), 16, "center")
            np.testing.assert_array_equal(decode_png(square["image"]), np.asarray(made))


def test_counts_say_what_loading_needs(tmp_path: Path):
    source = make_folder(tmp_path / "photos", per_class=4)
    output = shard_output(tmp_path, job(source, pictures="source", view_px=24, crop="resize"))
    counts = output.read_json("counts.json")
    assert (counts["pictures"], counts["crop"], counts["view_px"]) == ("source", "resize", 24)
    assert counts["limits"] == {
        "min_side_px": 8,
        "max_aspect_ratio": 20.0,
        "max_pixels": 100_000_000,
    }


def test_the_index_finds_every_picture_and_label(tmp_path: Path):
    source = make_folder(tmp_path / "photos", per_class=8)
    output = shard_output(tmp_path, job(source, pictures="source"))
    for split in ("train", "val"):
        index = parse_index(output.local(f"{split}/index.arrow").read_bytes())
        names = output.names(f"{split}/part-", ".arrow")
        assert list(index.shard_rows) == output.read_json("counts.json")[split]["shards"]
        for number, row in enumerate(rows(output, split)):
            shard = names[int(index.shards_of(np.array([number]))[0])]
            start, size = int(index.starts[number]), int(index.sizes[number])
            data = files.read_range(str(output.local(shard)), start, start + size)
            assert (data, index.labels[number]) == (row["image"], row["label"])


def test_shards_end_at_a_number_of_bytes(tmp_path: Path, monkeypatch):
    source = make_folder(tmp_path / "photos", per_class=5)
    size = len((source / "cat" / "000.png").read_bytes())
    monkeypatch.setattr(sharding, "MAX_SHARD_BYTES", 2 * size + size // 2)
    shard = job(source, pictures="source", val_fraction=0, rows_per_shard=100)
    output = shard_output(tmp_path, shard)
    assert output.read_json("counts.json")["train"]["shards"] == [2] * 5
    assert len(rows(output, "train")) == 10


def test_a_file_larger_than_a_column_can_hold_is_refused(tmp_path: Path, monkeypatch):
    source = make_folder(tmp_path / "photos")
    (source / "cat" / "000.png").write_bytes(encoded(pixels(0)) + bytes(100_000))
    monkeypatch.setattr("drorae.data.shard_files.MAX_FILE_BYTES", 100_000)
    found = rejects(shard_output(tmp_path, job(source, val_fraction=0.0)))
    assert list(found) == ["cat/000.png"]
    assert "bytes is larger than 100000" in found["cat/000.png"]


def test_a_source_that_changes_meanwhile_ends_the_stage_and_is_checked_anew(tmp_path: Path):
    source = make_folder(tmp_path / "photos", per_class=3)
    other = encoded(pixels(999))

    def changing(*call):
        for name, result in run_in_process(*call):
            (source / "cat" / "000.png").write_bytes(other)
            yield name, result

    shard = job(source, pictures="source", val_fraction=0)
    with pytest.raises(Fatal, match=r"cat/000\.png.* has changed since it was checked"):
        run_shard(context(tmp_path), shard=shard, executor=changing)
    run_shard(context(tmp_path), shard=shard, executor=run_in_process)


def test_an_interrupted_run_continues_with_the_same_result(tmp_path: Path):
    source = make_folder(tmp_path / "photos", per_class=10)
    whole = shard_output(tmp_path / "a", job(source))
    ctx = context(tmp_path / "b")
    done: list[str] = []

    def stopping(*call):
        for name, result in run_in_process(*call):
            done.append(name)
            yield name, result
            if len(done) == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_shard(ctx, shard=job(source), executor=stopping)
    before = len(files.list_files(f"{ctx.work_uri}/done"))
    output = committed(ctx, run_shard(ctx, shard=job(source), executor=run_in_process))
    assert before == 3
    assert digests(output) == digests(whole)


def test_added_files_move_no_image_to_the_other_split(tmp_path: Path):
    source = make_folder(tmp_path / "photos", per_class=10)
    before = {r["key"] for r in rows(shard_output(tmp_path / "a", job(source)), "val")}
    for number in range(10, 20):
        (source / "cat" / f"{number:03d}.png").write_bytes(encoded(pixels(500 + number)))
    after = {r["key"] for r in rows(shard_output(tmp_path / "b", job(source)), "val")}
    assert before <= after


def test_caps_are_exact_and_balanced(tmp_path: Path):
    source = make_folder(tmp_path / "photos", per_class=12, classes=("a", "b", "c"))
    output = shard_output(tmp_path, job(source, max_train_images=9, max_val_images=3))
    labels = [r["label"] for r in rows(output, "train")]
    assert sorted(labels) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(rows(output, "val")) == 3
    packs = files.list_sizes(f"{output.uri}/_work/packs")
    stored = sum(len(r["image"]) for split in ("train", "val") for r in rows(output, split))
    assert sum(packs.values()) == stored  # what the cap leaves out was not decoded


def make_bad(root: Path) -> dict[str, str]:
    """Put one file of every bad kind into a class folder; key -> part of the expected reason."""
    folder = root / "cat"
    jpeg = encoded(pixels(1, 64, 64), "JPEG")
    frames = [Image.fromarray(pixels(i)) for i in range(2)]
    bad = {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated or damaged"),
        "text.png": (b"not a picture at all", "not an image"),
        "animated.gif": (
            encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
            "2 frames",
        ),
        "dot.png": (encoded(pixels(0, 1, 1)), "smaller than 8 px"),
        "strip.png": (encoded(pixels(0, 4000, 10)), "aspect ratio"),
        "empty.jpg": (b"", "empty file"),
        "zz-copy.png": ((folder / "000.png").read_bytes(), "duplicate of "),
    }
    for name, (data, _) in bad.items():
        (folder / name).write_bytes(data)
    (folder / "loop").symlink_to(root)
    expected = {f"cat/{name}": reason for name, (_, reason) in bad.items()}
    return {**expected, "cat/loop": "symbolic link loop"}


def test_bad_files_are_listed_with_reasons_and_good_odd_ones_kept(tmp_path: Path):
    source = make_folder(tmp_path / "photos", per_class=3)
    expected = make_bad(source)
    levels = np.arange(400, dtype=np.uint16).reshape(20, 20) * 160
    (source / "dog" / "deep.png").write_bytes(encoded(Image.fromarray(levels)))
    cmyk = Image.fromarray(pixels(77)).convert("CMYK")
    (source / "dog" / "print.jpg").write_bytes(encoded(cmyk, "JPEG"))
    output = shard_output(tmp_path, job(source, val_fraction=0.0))
    found = rejects(output)
    copy = next(k for k in ("cat/zz-copy.png", "cat/000.png") if k in found)
    expected[copy] = expected.pop("cat/zz-copy.png")
    assert set(found) == set(expected)
    assert all(expected[key] in found[key] for key in expected)
    kept = {r["key"] for r in rows(output, "train")}
    assert {"dog/deep.png", "dog/print.jpg"} <= kept
    assert output.read_json("counts.json")["rejected"] == len(expected)


def test_duplicates_across_splits_stay_in_validation(tmp_path: Path):
    source = make_folder(tmp_path / "train", per_class=3)
    held_out = make_folder(tmp_path / "val", per_class=2)
    output = shard_output(tmp_path, job(source, val_source=str(held_out)))
    assert [r["key"].split("/")[0] for r in rows(output, "val")] == ["val"] * 4
    assert {r["key"][-7:] for r in rows(output, "train")} == {"002.png"}
    assert len(rejects(output)) == 4


def test_duplicates_may_be_kept(tmp_path: Path):
    source = make_folder(tmp_path / "photos", per_class=2)
    (source / "cat" / "copy.png").write_bytes((source / "cat" / "000.png").read_bytes())
    output = shard_output(tmp_path, job(source, val_fraction=0.0, duplicates="keep"))
    assert len(rows(output, "train")) == 5


def test_a_rejected_file_under_a_cap_is_replaced(tmp_path: Path):
    source = make_folder(tmp_path / "photos", per_class=6)
    for number in range(4):
        (source / "cat" / f"bad{number}.png").write_bytes(b"bad")
    output = shard_output(tmp_path, job(source, val_fraction=0.0, max_train_images=12))
    assert len(rows(output, "train")) == 12


def test_no_usable_image_names_the_reasons(tmp_path: Path):
    folder = tmp_path / "photos" / "cat"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"text")
    (folder / "b.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 x empty file.*not an image|not an image.*1 x empty"):
        shard_output(tmp_path, job(tmp_path / "photos", val_fraction=0.0))


def test_missing_validation_images_are_told(tmp_path: Path):
    source = make_folder(tmp_path / "photos", per_class=1)
    with pytest.raises(ValueError, match="leaves no validation image"):
        shard_output(tmp_path, job(source, val_fraction=0.0001))


def test_cifar_asset_keeps_its_own_splits(tmp_path: Path):
    folder = tmp_path / "assets" / "cifar10"
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    write_sheets(folder, "train", images, [i % 10 for i in range(40)])
    write_sheets(folder, "val", images[:10] // 2, list(range(10)))
    entry = {"files": [{"name": "cifar10/test_batch.png", "size_bytes": 0}]}
    entry["files"][0]["size_bytes"] = (folder / "test_batch.png").stat().st_size
    (tmp_path / "assets" / INDEX_NAME).write_text(json.dumps({"cifar10": entry}))
    shard = job("asset:cifar10", resolution_px=32, max_train_images=20, rows_per_shard=8)
    output = shard_output(tmp_path, shard)
    assert output.read_json("counts.json")["train"]["shards"] == [8, 8, 4]
    row = rows(output, "train")[0]
    number = int(row["key"].split("/")[1])
    np.testing.assert_array_equal(decode_png(row["image"]), images[number])


@pytest.mark.parametrize(
    "changes",
    [
        {"resolution_px": 0},
        {"max_train_images": 0},
        {"val_fraction": 1.0},
        {"max_aspect_ratio": 0.5},
        {"source": ""},
        {"view_px": 384},
        {"view_px": 100, "pictures": "source"},
    ],
)
def test_impossible_jobs_are_refused(changes: dict):
    with pytest.raises(ValueError, match=f"shard.{next(iter(changes))}"):
        ShardJob(**{"source": "x", **changes})
