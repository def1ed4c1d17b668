import io
import json
import unicodedata
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from drorae.data.readers.candidates import ReadRule, sort_class_names
from drorae.data.readers.labels import (
    BadLabel,
    Stated,
    cell_label,
    is_label_file,
    label_text,
    stated_by_files,
)


def stated(path: str, content: Any, rule: ReadRule | None = None) -> Stated:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return stated_by_files({path: data}, rule or ReadRule())


def json_lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(**columns: list[Any]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def is_doubtful(found: Stated) -> bool:
    return any(note.is_doubtful for note in found.notes)


@pytest.mark.parametrize("value", [None, "", " ", float("nan"), -1, -1.0, "\ufeff"])
def test_what_states_no_label_is_none(value: Any) -> None:
    assert label_text(value) == ""


@pytest.mark.parametrize(
    ("value", "name"),
    [(2.0, "2"), (7, "7"), (" cat\n", "cat"), (b"\xef\xbb\xbfcat", "cat"), ("\ud800", "\\ud800")],
)
def test_labels_are_text(value: Any, name: str) -> None:
    assert label_text(value) == name


@pytest.mark.parametrize("value", [True, [1, 2], {"a": 1}, 0.5, float("inf")])
def test_what_is_no_single_class_is_a_bad_label(value: Any) -> None:
    with pytest.raises(BadLabel, match="label"):
        label_text(value)


def test_cells_of_text_that_are_whole_numbers_lose_their_decimals() -> None:
    assert [cell_label(text) for text in ("6.0", "10", "-1", "007", "v1.5", "")] == [
        *("6", "10", "", "007", "v1.5", "")
    ]


def test_numbers_of_any_length_are_labels_and_can_be_sorted() -> None:
    long = "1" * 5000
    assert label_text(10**400) == str(10**400)
    assert cell_label(f"-{long}") == f"-{long}"
    assert sort_class_names([long, "2"]) == [long, "2"]


def test_names_of_label_files_are_known_in_every_folder() -> None:
    names = ["dataset.json", "train/metadata.jsonl", "a/b/metadata.csv", "metadata.parquet"]
    assert all(map(is_label_file, names))
    assert not any(map(is_label_file, ["cat.json", "my_dataset.json", "metadata.json"]))


def test_stylegans_file_labels_images_relative_to_itself() -> None:
    labels = [["00000/img0.png", 6], ["00000\\img1.png", 9.0]]
    found = stated("top/dataset.json", {"labels": labels})
    assert found.label_of == {"top/00000/img0.png": "6", "top/00000/img1.png": "9"}
    assert found.decides
    assert not is_doubtful(found)


def test_stylegans_file_may_say_that_there_are_no_labels() -> None:
    found = stated("dataset.json", {"labels": None})
    assert found.decides
    assert not found.label_of
    assert "no labels" in found.notes[0].text


def test_a_vector_of_attributes_is_no_label() -> None:
    found = stated("dataset.json", {"labels": [["0.png", [0, 1]], ["1.png", 1]]})
    assert found.label_of == {"1.png": "1"}
    assert "no name and no number" in found.rejects["0.png"]


@pytest.mark.parametrize("content", [{"labels": {"0": "background"}}, {"name": "liver"}, [1]])
def test_another_dataset_json_is_left_alone_and_told(content: Any) -> None:
    found = stated("dataset.json", content)
    assert not found.decides
    assert is_doubtful(found)


TABLES = {
    "metadata.jsonl": json_lines(
        {"file_name": "a/0.png", "label": "rose, red"}, {"file_name": "1.png", "label": "tulip"}
    ),
    "metadata.csv": b'\xef\xbb\xbflabel,file_name\r\n"rose, red",a/0.png\r\ntulip,1.png\r\n',
    "metadata.parquet": parquet(file_name=["a/0.png", "1.png"], label=["rose, red", "tulip"]),
}


@pytest.mark.parametrize("name", TABLES)
def test_metadata_labels_images_relative_to_itself(name: str) -> None:
    found = stated(f"train/{name}", TABLES[name])
    assert found.label_of == {"train/a/0.png": "rose, red", "train/1.png": "tulip"}
    assert not is_doubtful(found)


def test_the_label_column_is_a_setting() -> None:
    table = json_lines({"file_name": "0.png", "label": 1, "fine": 12})
    assert stated("metadata.jsonl", table, ReadRule(label_column="fine")).label_of == {
        "0.png": "12"
    }
    assert not stated("metadata.jsonl", table, ReadRule(label_column=None)).decides


def test_metadata_without_labels_leaves_the_classes_to_folders_and_is_told() -> None:
    found = stated("metadata.csv", b"file_name,text\n0.png,a rose\n")
    assert not found.decides
    assert is_doubtful(found)
    assert "'label'" in found.notes[0].text
    assert "text" in found.notes[0].text


def test_labels_that_are_missing_in_a_table_are_none() -> None:
    found = stated("metadata.csv", b"file_name,label\n0.png,6.0\n1.png,\n2.png,-1\n")
    assert found.label_of == {"0.png": "6", "1.png": "", "2.png": ""}


def test_one_image_with_two_labels_is_rejected_and_equal_ones_are_fine() -> None:
    rows = [("0.png", 1), ("0.png", 2), ("1.png", 3), ("1.png", 3)]
    table = json_lines(*({"file_name": name, "label": label} for name, label in rows))
    found = stated("metadata.jsonl", table)
    assert found.label_of == {"1.png": "3"}
    assert found.rejects == {"0.png": "has two labels: '1' and '2'"}


def test_labels_of_images_that_are_not_there_are_counted() -> None:
    found = stated("metadata.csv", b"file_name,label\n0.png,6\n../1.png,7\n")
    (note,) = found.absent(["0.png"])
    assert note.is_doubtful
    assert note.text.startswith("1 labels are of images that are not there")
    assert found.absent(["0.png", "../1.png"]) == ()


def test_names_are_compared_in_one_form_of_unicode() -> None:
    decomposed = unicodedata.normalize("NFD", "café.png")
    found = stated("metadata.csv", f"file_name,label\n{decomposed},6\n".encode())
    assert found.absent([decomposed]) == ()
    assert found.label_of == {"café.png": "6"}


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("dataset.json", b'{"labels": [["a.png", 1'),
        ("dataset.json", b"[" * 100_000),
        ("dataset.json", b'{"labels": [1, 2]}'),
        ("dataset.json", b"\xff\xfe"),
        ("metadata.jsonl", b'{"file_name": "a.png"}\n{"file'),
        ("metadata.jsonl", b"[1]\n"),
        ("metadata.csv", b"file_name,label\n\xe9.png,1\n"),
        ("metadata.csv", b'file_name,label\n"' + b"a" * 200_000),
        ("metadata.parquet", b"PAR1"),
    ],
)
def test_a_damaged_label_file_is_one_clear_error(path: str, data: bytes) -> None:
    with pytest.raises(ValueError, match=f"label file '{path}' in the source cannot be read"):
        stated(path, data)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-8"])
def test_text_may_be_what_windows_writes(encoding: str) -> None:
    assert label_text("café\r\n".encode(encoding)) == "café"


def test_labels_of_stylegan_may_be_a_mapping() -> None:
    found = stated("dataset.json", {"labels": {"00000/a.png": 3, "00000/b.png": 1}})
    assert found.label_of == {"00000/a.png": "3", "00000/b.png": "1"}
