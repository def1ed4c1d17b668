import unicodedata
from collections import Counter

import pytest

from drorae.data.readers.class_paths import read_folders


def read(*paths: str, has_classes: bool = True) -> dict[str, str]:
    """Split, class and reason of each image, as one text."""
    counts = Counter(path.rpartition("/")[0] for path in paths)
    places = read_folders(counts, has_classes=has_classes).places
    found = {}
    for path in paths:
        place = places[path.rpartition("/")[0]]
        found[path] = place.reason or f"{place.split}:{place.class_name}"
    return found


def doubts(*paths: str) -> list[str]:
    counts = Counter(path.rpartition("/")[0] for path in paths)
    return [note.text for note in read_folders(counts).notes if note.is_doubtful]


def test_the_first_folder_is_the_class_whatever_lies_deeper() -> None:
    assert read("cat/1.png", "cat/old/2.png", "dog/3.png") == {
        "cat/1.png": ":cat",
        "cat/old/2.png": ":cat",
        "dog/3.png": ":dog",
    }


def test_folders_around_all_images_are_left_out_and_told() -> None:
    paths = [f"{folder}/{i}.png" for folder in ("a/b/rose", "./a/b/tulip") for i in range(3)]
    assert set(read(*paths).values()) == {":rose", ":tulip"}
    assert "'a/b' is around all images" in doubts(*paths)[0]


def test_a_single_folder_of_images_is_a_class() -> None:
    assert read("cat/1.png", "cat/2.png") == {"cat/1.png": ":cat", "cat/2.png": ":cat"}


@pytest.mark.parametrize("stray", ["preview.png", "flowers/preview.png"])
def test_a_stray_picture_changes_no_class(stray: str) -> None:
    paths = [f"flowers/{name}/{i}.png" for name in ("rose", "tulip") for i in range(2)]
    found = read(*paths, stray)
    assert found.pop(stray) == "lies outside of every class folder"
    assert found == read(*paths)


def test_a_stray_folder_makes_no_class_of_images_that_lie_flat() -> None:
    found = read("1.png", "2.png", "3.png", "preview/4.png")
    assert [found["1.png"], found["preview/4.png"]] == [
        *(":", "lies in a folder, although most images do not")
    ]


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "valid"), ("TRAIN", "dev")])
@pytest.mark.parametrize("top", ["", "ILSVRC/Data/CLS-LOC/"])
def test_splits_are_folders(names: tuple[str, str], top: str) -> None:
    train, val = names
    paths = [f"{top}{split}/{c}/{i}.png" for split in names for c in "ab" for i in range(2)]
    found = read(*paths)
    assert found[f"{top}{train}/a/0.png"] == "train:a"
    assert found[f"{top}{val}/b/1.png"] == "val:b"
    assert not doubts(*paths)


@pytest.mark.parametrize("val", ["val/9.png", "val/images/9.png"])
def test_validation_may_lie_flat(val: str) -> None:
    assert read("train/a/1.png", "train/b/2.png", val)[val] == "val:"


def test_test_images_are_validation_only_where_there_is_none() -> None:
    assert read("train/a/1.png", "test/a/2.png")["test/a/2.png"] == "val:a"
    found = read("train/a/1.png", "val/a/3.png", "test/a/2.png")
    assert found["test/a/2.png"] == "belongs to split test"


def test_folders_around_the_classes_of_a_split_are_left_out() -> None:
    found = read("train/images/a/1.png", "train/images/b/1.png", "val/images/a/1.png")
    assert list(found.values()) == ["train:a", "train:b", "val:a"]


def test_what_lies_beside_splits_is_left_out_and_told() -> None:
    paths = ["train/a/1.png", "train/b/1.png", "val/a/1.png", "samples/1.png"]
    assert read(*paths)["samples/1.png"] == "lies in no split"
    assert "beside the splits" in doubts(*paths)[0]


def test_classes_that_are_called_like_splits_stay_classes() -> None:
    assert set(read("bus/1.png", "train/1.png", "tram/1.png").values()) == {
        *(":bus", ":train", ":tram")
    }
    paths = [f"{name}/{i}.png" for name in ("bus", "tram", "car") for i in range(2)]
    assert read(*paths, "train/1.png", "test/1.png")["train/1.png"] == ":train"
    assert "are read as classes" in doubts(*paths, "train/1.png", "test/1.png")[0]


def test_training_images_alone_are_no_split() -> None:
    assert read("train/a/1.png", "train/b/1.png")["train/a/1.png"] == ":a"
    assert read("train/1.png", "train/2.png")["train/1.png"] == ":"


def test_validation_has_no_classes_where_training_has_none() -> None:
    paths = ["train/1.png", "train/2.png", "val/a/3.png", "val/b/4.png"]
    assert set(read(*paths).values()) == {"train:", "val:"}
    assert "no class folders" in doubts(*paths)[0]


def test_a_large_class_with_folders_of_its_own_is_told() -> None:
    paths = ["a/1.png", "a/x/2.png", "a/y/3.png", "b/1.png"]
    assert "2 folders of its own" in doubts(*paths)[0]
    assert not doubts("a/1.png", "b/2.png", "b/3.png")


def test_two_forms_of_unicode_are_one_class() -> None:
    names = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    counts = {name: 1 for name in names}
    reading = read_folders(counts)
    assert {place.class_name for place in reading.places.values()} == {names[0]}
    assert "Unicode are one" in reading.notes[-1].text


def test_where_labels_are_stated_folders_are_only_splits() -> None:
    paths = ["1.png", "x/2.png", "y/3.png"]
    assert set(read(*paths, has_classes=False).values()) == {":"}
    found = read("train/1.png", "val/x/2.png", has_classes=False)
    assert list(found.values()) == ["train:", "val:"]


def test_files_of_unknown_kind_make_no_class() -> None:
    places = read_folders({"cat": 2, "docs": 0, "cat/more": 0}).places
    assert places["docs"].reason
    assert places["cat/more"].class_name == "cat"
    assert read_folders({"cat": 0, "dog": 0}).places["dog"].class_name == "dog"


@pytest.mark.parametrize(
    "names",
    [("seg_train", "seg_test"), ("train2017", "val2017"), ("training_set", "test_set")],
)
def test_splits_with_the_same_other_words_are_read_and_told(names: tuple[str, str]) -> None:
    train, val = names
    paths = [f"{split}/{split}/{name}/1.png" for split in names for name in ("sea", "ice")]
    found = read(*paths, "seg_pred/1.png")
    assert found.pop("seg_pred/1.png") == "lies in no split"
    assert set(found.values()) == {"train:sea", "train:ice", "val:sea", "val:ice"}
    assert f"{train} is train" in "".join(doubts(*paths))
    assert f"{val} is val" in "".join(doubts(*paths))
    assert "folders of its own" not in "".join(doubts(*paths))


def test_classes_with_words_of_splits_and_others_are_classes() -> None:
    found = read("passenger train/1.png", "crash test/2.png")
    assert set(found.values()) == {":passenger train", ":crash test"}
    found = read(*(f"{name}/1.png" for name in ("train1", "test2", "x1", "x2")))
    assert set(found.values()) == {":train1", ":test2", ":x1", ":x2"}


def test_folders_of_what_belongs_to_images_are_told() -> None:
    told = "".join(doubts("cub/images/1.png", "cub/masks/1.png"))
    assert "folders images, masks are read as classes" in told
    assert not doubts("images/1.png")
