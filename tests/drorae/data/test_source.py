import errno
import io
import json
import os
import re
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fakes import encoded, pixels

from drorae.data.readers import ranges, source
from drorae.data.readers.candidates import Candidate, Listing, ReadRule, Record, to_candidates
from drorae.data.readers.source import list_source, read_records

PICTURE = encoded(pixels(0))


def write(root: Path, names: Sequence[str], data: bytes = PICTURE) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_tar(path: Path, members: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name in members:
            info = tarfile.TarInfo(name)
            info.size = len(PICTURE)
            archive.addfile(info, io.BytesIO(PICTURE))
    return path


def write_zip(path: Path, members: Sequence[str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in members:
            archive.writestr(name, PICTURE)
    return path


def write_parquet(path: Path, labels: Sequence[Any] | None, images: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"image": [PICTURE] * images} | ({} if labels is None else {"label": labels})
    pq.write_table(pa.table(columns), path)
    return path


def read(path: Path, **rule: Any) -> Listing:
    return list_source(str(path), ReadRule(**rule))


def found(listing: Listing) -> dict[str, str]:
    """Split and class of every image."""
    rows = to_candidates(listing.table)
    return {c.key: f"{c.split}:{c.class_name}" for c in rows}


def doubts(listing: Listing) -> str:
    return "\n".join(note.text for note in listing.notes if note.is_doubtful)


def test_one_rule_reads_folders_tars_and_zips(tmp_path: Path) -> None:
    names = [f"top/{name}/{i}.png" for name in ("rose", "tulip") for i in range(2)]
    write(tmp_path / "tree", names)
    write_tar(tmp_path / "set.tar", [f"./{name}" for name in names])
    write_zip(tmp_path / "set.zip", names)
    for place in ("tree", "set.tar", "set.zip"):
        listing = read(tmp_path / place)
        assert listing.class_names == ("rose", "tulip")
        assert "'top' is around all images" in doubts(listing)


def test_old_tools_for_windows_separate_folders_by_backslashes(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", ["rose/0.png", "tulip/1.png"])
    path.write_bytes(path.read_bytes().replace(b"rose/", b"rose\\").replace(b"tulip/", b"tulip\\"))
    assert read(path).class_names == ("rose", "tulip")


def test_splits_are_read_from_folders_in_archives(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "set.tar", ["train/a/1.png", "train/b/2.png", "val/a/3.png"])
    assert set(found(read(path)).values()) == {"train:a", "train:b", "val:a"}


def test_splits_are_read_from_names_of_containers(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-0", "test-0"):
        write_tar(tmp_path / "data" / f"{name}.tar", [f"cat/{name}.png", f"dog/{name}.png"])
    listing = read(tmp_path)
    split_of = {c.container.rpartition("/")[2]: c.split for c in to_candidates(listing.table)}
    assert split_of == {
        "train-00000-of-00002.tar": "train",
        "train-00001-of-00002.tar": "train",
        "validation-0.tar": "val",
    }
    assert {reason for _, reason in listing.rejects} == {"belongs to split test"}
    assert listing.class_names == ("cat", "dog")


def test_containers_of_training_alone_state_no_split(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", ["cat/1.png", "dog/1.png"])
    assert set(found(read(tmp_path)).values()) == {":cat", ":dog"}


def test_splits_that_some_containers_do_not_name_are_told(tmp_path: Path) -> None:
    for name in ("train-0", "val-0", "more-0"):
        write_tar(tmp_path / f"{name}.tar", ["cat/1.png", "dog/1.png"])
    listing = read(tmp_path)
    assert {c.split for c in to_candidates(listing.table)} == {""}
    assert "1 of 3 containers are of no split" in doubts(listing)


def test_an_archive_per_class_is_read_and_told(tmp_path: Path) -> None:
    for name in ("n01440764", "n01443537"):
        write_tar(tmp_path / f"{name}.tar", [f"{name}_1.JPEG"])
    listing = read(tmp_path)
    assert listing.class_names == ("n01440764", "n01443537")
    assert "classes are archives" in doubts(listing)
    assert read(tmp_path, classes_from="none").class_names == ("all",)
    assert read(tmp_path, classes_from="folders").class_names == ("all",)


@pytest.mark.parametrize("names", [("00000", "00001"), ("shard-000001", "shard-000007")])
def test_numbered_archives_are_shards_and_told(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write_tar(tmp_path / f"{name}.tar", [f"{name}.png"])
    listing = read(tmp_path)
    assert listing.class_names == ("all",)
    assert "shard.classes_from=archives" in doubts(listing)
    assert read(tmp_path, classes_from="archives").class_names == names


def test_classes_from_archives_needs_archives(tmp_path: Path) -> None:
    write(tmp_path, ["cat/1.png"])
    with pytest.raises(ValueError, match="classes_from='archives'"):
        read(tmp_path, classes_from="archives")
    assert read(tmp_path, classes_from="none").class_names == ("all",)


def test_a_mixed_folder_is_read_by_what_most_of_it_is(tmp_path: Path) -> None:
    write(tmp_path, ["assets/logo.png", "README.md"])
    write_parquet(tmp_path / "data" / "train-0.parquet", None)
    listing = read(tmp_path, label_column=None)
    assert list(found(listing)) == [f"data/train-0.parquet/0000000{i}" for i in range(3)]
    assert dict(listing.rejects) == {
        "assets/logo.png": "lies beside containers that hold most images",
        "README.md": "not an image by its name",
    }
    assert "1 pictures lie beside 1 containers with 3 images" in doubts(listing)


def test_one_container_among_pictures_is_a_reject(tmp_path: Path) -> None:
    write(tmp_path, [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(3)])
    write_tar(tmp_path / "old.tar", ["cat/1.png"])
    pq.write_table(pa.table({"text": ["no image"]}), tmp_path / "texts.parquet")
    listing = read(tmp_path)
    assert len(listing) == 6
    assert dict(listing.rejects).keys() == {"old.tar", "texts.parquet"}
    assert "6 pictures lie beside 2 containers with 1 images" in doubts(listing)


def test_a_tie_goes_to_the_containers(tmp_path: Path) -> None:
    write(tmp_path, ["a.png"])
    write_tar(tmp_path / "set.tar", ["cat/1.png"])
    assert list(found(read(tmp_path))) == ["set.tar/cat/1.png"]


def test_a_folder_that_is_called_like_a_container_is_a_folder(tmp_path: Path) -> None:
    write_parquet(tmp_path / "images.parquet" / "part-0.snappy.parquet", None)
    write(tmp_path / "images.parquet", ["_SUCCESS"], b"")
    inside = read(tmp_path / "images.parquet", label_column=None)
    around = read(tmp_path, label_column=None)
    assert len(inside) == len(around) == 3
    assert inside.rejects == around.rejects == []


def test_a_stated_label_beside_an_image_is_not_its_folder(tmp_path: Path) -> None:
    write(tmp_path, ["00000/0.png", "00000/1.png", "00001/2.png"])
    (tmp_path / "dataset.json").write_text('{"labels": [["00000/0.png", 6], ["00001/2.png", 10]]}')
    listing = read(tmp_path)
    assert found(listing) == {"00000/0.png": ":6", "00001/2.png": ":10"}
    assert listing.class_names == ("6", "10")
    assert listing.rejects == [("00000/1.png", "has no label although others have")]
    assert "1 images have no label although others have" in doubts(listing)


def test_metadata_of_an_image_folder_keeps_its_splits(tmp_path: Path) -> None:
    write(tmp_path, ["train/0.png", "train/1.png", "test/2.png"])
    for split, rows in (("train", "0.png,a\n1.png,b\n"), ("test", "2.png,b\n")):
        (tmp_path / split / "metadata.csv").write_text(f"file_name,label\n{rows}")
    assert found(read(tmp_path)) == {
        "test/2.png": "val:b",
        "train/0.png": "train:a",
        "train/1.png": "train:b",
    }


def test_files_that_are_no_images_are_rejects_or_counted(tmp_path: Path) -> None:
    write(tmp_path, ["cat/1.png", "dog/2.png", "dog/3.jpg_large", "dog/noext"])
    other = ["cat/1.txt", "cat/1.json", "cat/2.json", "clip.mp4", "old.rar", "Thumbs.db"]
    write(tmp_path, other, b"")
    listing = read(tmp_path)
    assert set(found(listing)) == {"cat/1.png", "dog/2.png", "dog/3.jpg_large", "dog/noext"}
    assert dict(listing.rejects).keys() == {"cat/2.json", "clip.mp4", "old.rar", "Thumbs.db"}
    assert any("1 .json, 1 .txt" in note.text for note in listing.notes)


def test_names_that_differ_only_by_case_are_told(tmp_path: Path) -> None:
    write(tmp_path, ["Cat/1.png", "cat/2.png", "dog/3.png"])
    listing = read(tmp_path)
    assert listing.class_names == ("Cat", "cat", "dog")
    assert "'Cat' and 'cat'" in doubts(listing)


def test_two_forms_of_a_name_are_one_class(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    write(tmp_path, [f"{name}/{form}.png" for form, name in enumerate(names)])
    listing = read(tmp_path)
    assert listing.class_names == (names[0],)
    assert set(found(listing)) == {f"{names[0]}/0.png", f"{names[1]}/1.png"}


def test_label_order_is_by_value_of_numbers_else_by_code_point(tmp_path: Path) -> None:
    write(tmp_path / "numbers", [f"{name}/1.png" for name in ("10", "9", "2")])
    assert read(tmp_path / "numbers").class_names == ("2", "9", "10")
    write(tmp_path / "text", [f"{name}/1.png" for name in ("b", "B", "ä", "a10", "a9")])
    assert read(tmp_path / "text").class_names == ("B", "a10", "a9", "b", "ä")


def test_double_slashes_in_a_store_are_part_of_the_name() -> None:
    memory = fsspec.filesystem("memory")
    for number, name in enumerate(("cat//0.png", "/cat/1.png", "dog/2.png")):
        memory.pipe_file(f"/double/{name}", encoded(pixels(number)))
    listing = list_source("memory://double")
    assert found(listing) == {"/cat/1.png": ":cat", "cat//0.png": ":cat", "dog/2.png": ":dog"}
    assert [r.error for r in read_records(to_candidates(listing.table))] == [""] * 3


def failing(error: Exception) -> Any:
    def read_some(candidates: Sequence[Candidate]) -> Iterator[Record]:
        for candidate in candidates:
            if candidate.container == "bad":
                raise error
            yield Record(candidate, b"good")

    return read_some


def candidates(containers: Sequence[str]) -> list[Candidate]:
    return [Candidate(str(i), "", "", "tar", name) for i, name in enumerate(containers)]


def use_reader(monkeypatch: pytest.MonkeyPatch, readers: Mapping[str, Any]) -> None:
    monkeypatch.setattr(source, "READERS", readers)


def test_what_a_reader_does_not_expect_rejects_its_container(monkeypatch) -> None:
    use_reader(monkeypatch, {"tar": failing(pa.ArrowNotImplementedError("new"))})
    records = list(read_records(candidates(["a", "bad", "bad", "c"])))
    assert [r.candidate.key for r in records] == ["0", "1", "2", "3"]
    assert [bool(r.error) for r in records] == [False, True, True, False]
    assert "ArrowNotImplementedError: new" in records[1].error


@pytest.mark.parametrize("error", [RuntimeError("store away"), ConnectionError("lost")])
def test_a_store_that_fails_ends_the_reading(monkeypatch, error: Exception) -> None:
    use_reader(monkeypatch, {"tar": failing(error)})
    with pytest.raises(type(error)):
        list(read_records(candidates(["a", "bad"])))


def test_tables_of_captions_beside_tars_are_rejects_and_told(tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / f"{number:05d}.tar", [f"cat/{number}.png", f"dog/{number}.png"])
        pq.write_table(
            pa.table({"url": ["u"], "caption": ["c"]}), tmp_path / f"{number:05d}.parquet"
        )
    listing = read(tmp_path)
    assert listing.class_names == ("cat", "dog")
    assert len(listing) == 4
    assert [key for key, _ in listing.rejects] == ["00000.parquet", "00001.parquet"]
    assert str(tmp_path) not in str(listing.rejects)
    assert "2 of 4 containers hold no image" in doubts(listing)


def test_rows_without_a_label_are_no_class_where_all_others_have_bad_ones(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [[0], [0, 1], None])
    with pytest.raises(ValueError, match="has no label: label '\\[0\\]' is no name"):
        read(path)


@pytest.mark.parametrize("labels", [["cat", "None", "dog"], ["nan", "cat", "cat"]])
def test_names_that_mean_no_label_are_told(labels: Sequence[str], tmp_path: Path) -> None:
    listing = read(write_parquet(tmp_path / "a.parquet", labels))
    assert "which often means: no label" in doubts(listing)


def test_numbers_beside_names_are_told(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["cat", "dog", "owl"])
    write_parquet(tmp_path / "b.parquet", [0, 1, 0])
    assert "2 labels are numbers and 3 are names" in doubts(read(tmp_path))


def test_partitions_of_a_table_are_labels(tmp_path: Path) -> None:
    for value in ("hot%20dog", "cat", "__HIVE_DEFAULT_PARTITION__"):
        write_parquet(tmp_path / f"label={value}" / "part-0.parquet", None, images=1)
    listing = read(tmp_path)
    assert listing.class_names == ("cat", "hot dog")
    assert "labels are the folders 'label=...'" in doubts(listing)
    assert [reason for _, reason in listing.rejects] == ["has no label although others have"]


def test_tables_beside_images_without_labels_are_told(tmp_path: Path) -> None:
    write(tmp_path, ["train/1.png", "test/2.png", "trainLabels.csv"])
    listing = read(tmp_path)
    assert listing.class_names == ("all",)
    assert "if trainLabels.csv holds them, set shard.label_file" in doubts(listing)


def test_folders_that_systems_add_hold_no_images(tmp_path: Path) -> None:
    names = ["cat/1.png", "cat/@eaDir/1.png/thumb.png", "dog/1.png", "$RECYCLE.BIN/1.png"]
    write(tmp_path / "tree", [*names, "__MACOSX/dog/1.png"])
    write_tar(tmp_path / "set.tar", names)
    assert list(found(read(tmp_path / "tree"))) == ["cat/1.png", "dog/1.png"]
    assert list(found(read(tmp_path / "set.tar"))) == ["set.tar/cat/1.png", "set.tar/dog/1.png"]


def test_columns_that_could_not_be_read_as_labels_are_told(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [PICTURE], "labels": [[1]]}), tmp_path / "a.parquet")
    assert "(it has labels), so images have none" in doubts(read(tmp_path))


def test_an_error_of_a_part_names_the_whole_source(tmp_path: Path) -> None:
    for part, names in (("a", ["cat", "dog"]), ("b", ["bird", "cow"]), ("c", None)):
        table = pa.table({"image": [PICTURE] * 2, "label": [0, 1]})
        if names:
            feature = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(feature)})
        pq.write_table(table, tmp_path / f"{part}.parquet")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        list_source(str(tmp_path))


def test_tables_without_the_image_column_beside_a_picture_say_so(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [0, 1, 0])
    write(tmp_path, ["preview.png"])
    listing = read(tmp_path, image_column="img")
    assert len(listing) == 1
    ((key, reason),) = listing.rejects
    assert key == "a.parquet"
    assert "no column 'img'" in reason


def test_tables_of_another_column_are_not_replaced_by_a_preview(tmp_path: Path) -> None:
    for number in range(3):
        write_parquet(tmp_path / f"{number}.parquet", labels=None)
    write(tmp_path, ["preview.jpg"])
    with pytest.raises(ValueError, match=r"1 pictures lie beside 3 containers .*image_column"):
        read(tmp_path, image_column="img")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ESTALE])
def test_trouble_of_the_machine_rejects_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    candidates = to_candidates(read(write(tmp_path, ["cat/1.png"])).table)

    def in_trouble(*_: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ranges, "read_content", in_trouble)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        list(read_records(candidates))
