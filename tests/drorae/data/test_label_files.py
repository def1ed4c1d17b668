from collections.abc import Sequence
from pathlib import Path

import pytest

from drorae.data.readers.candidates import Listing, joined, listed, to_candidates
from drorae.data.readers.label_files import labelled_by_file, read_label_file

SETTING = "shard.val_label_file"
CLASSES = ("n01440764", "n01443537", "n03995372")


def write(folder: Path, text: str, name: str = "val.txt") -> dict[str, str]:
    (folder / name).write_text(text)
    return read_label_file(str(folder / name), SETTING)


def flat(*keys: str) -> Listing:
    return Listing(joined([listed("file", "/x", keys=keys, class_names=["all"] * len(keys))]), [])


def labelled(
    labels: dict[str, str], *keys: str, known: Sequence[str] = CLASSES
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    found = labelled_by_file(flat(*keys), labels, SETTING, known)
    return {c.key: c.class_name for c in to_candidates(found.table)}, found.rejects


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("val.txt", "0001.JPEG n01443537\n0002.JPEG n01440764\n"),
        ("val.txt", "val/0001 1\nval/0002 0\n"),
        ("val.txt", "0001.JPEG\tn01443537\t0\t32\t44\t62\n0002.JPEG\tn01440764\t1\t2\t3\t4\n"),
        (
            "LOC.csv",
            "ImageId,Boxes\n0001,n01443537 85 1 499 272\n0002,n01440764 1 2 3 4",
        ),
        ("val.csv", '0001.JPEG,"n01443537"\r\n0002.JPEG,n01440764\r\n'),
        ("val.txt", "\ufeff0001.JPEG n01443537\r\n\r\n0002.JPEG n01440764\r\n"),
    ],
)
def test_usual_label_files_are_read(tmp_path: Path, name: str, text: str) -> None:
    labels = write(tmp_path, text, name)
    found, rejects = labelled(labels, "val/0001.JPEG", "val/0002.JPEG")
    assert found == {"val/0001.JPEG": "n01443537", "val/0002.JPEG": "n01440764"}
    assert not rejects


def test_images_that_the_file_does_not_name_are_rejects(tmp_path: Path) -> None:
    found, rejects = labelled(write(tmp_path, "1.png 0\n"), "1.png", "2.png")
    assert list(found) == ["1.png"]
    assert rejects == [("2.png", "has no label in the label file")]


def test_a_name_that_fits_several_images_labels_none(tmp_path: Path) -> None:
    found, rejects = labelled(write(tmp_path, "1.png 0\n2.png 1\n"), "a/1.png", "b/1.png", "2.png")
    assert list(found) == ["2.png"]
    assert {reason for _, reason in rejects} == {"its name in the label file fits several images"}


def test_numbers_are_names_where_training_has_numbers(tmp_path: Path) -> None:
    labels = write(tmp_path, "1.png 2\n2.png 10\n")
    assert set(labelled(labels, "1.png", "2.png", known=("1", "2", "10"))[0].values()) == {
        "2",
        "10",
    }
    with pytest.raises(ValueError, match=r"does not know: 1 \(10\)"):
        labelled(labels, "1.png", "2.png", known=("1", "2"))


@pytest.mark.parametrize("label", ["3", "n99999999"])
def test_labels_that_training_does_not_know_are_an_error(tmp_path: Path, label: str) -> None:
    labels = write(tmp_path, f"1.png 0\n2.png {label}\n")
    with pytest.raises(ValueError, match=rf"{SETTING}.*{label}.*positions from 0 to 2"):
        labelled(labels, "1.png", "2.png")


def test_the_file_itself_may_name_the_classes(tmp_path: Path) -> None:
    labels = write(tmp_path, "image,label\n1.png,golden retriever\n", "labels.csv")
    assert labelled(labels, "1.png", known=())[0] == {"1.png": "golden retriever"}


@pytest.mark.parametrize("text", ["490\n361\n", "1.png\n"])
def test_labels_without_names_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"line 1.*expected lines NAME LABEL"):
        write(tmp_path, text)


def test_the_development_kits_numbers_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another order"):
        write(tmp_path, "490\n361\n")


def test_two_labels_of_one_image_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 2: '1.png' is 'b' here and 'a' before"):
        write(tmp_path, "1.png a\n1.png b\n")


def test_a_file_of_other_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"names none of 1 images, such as '1.png'"):
        labelled(write(tmp_path, "train_1.png 0\n"), "1.png")


def test_damaged_and_missing_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{SETTING}=.*does not exist"):
        read_label_file(str(tmp_path / "no.txt"), SETTING)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe1")
    with pytest.raises(ValueError, match="no UTF-8 text"):
        read_label_file(str(tmp_path / "bad.txt"), SETTING)


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "val.txt").write_text("1.png 0\n")
    assert read_label_file("~/val.txt", SETTING) == {"1.png": "0"}
