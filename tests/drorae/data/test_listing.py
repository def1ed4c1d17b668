from pathlib import Path

import pytest
from data_fakes import encoded, job, make_folder, pixels, shard_output

from drorae.data.listing import list_images
from drorae.data.readers.candidates import Listing, to_candidates
from drorae.data.shard_format import parse_index
from drorae.store.workspace import StageOutput


def write(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(pixels(1000 + number)))
    return root


def classes(listing: Listing, split: str) -> dict[str, str]:
    return {c.key: c.class_name for c in to_candidates(listing.table) if c.split == split}


def doubts(listing: Listing) -> str:
    return "\n".join(note.text for note in listing.notes if note.is_doubtful)


def labels(output: StageOutput, split: str) -> list[int]:
    data = output.local(f"{split}/index.arrow").read_bytes()
    return sorted(parse_index(data).labels.tolist())


def test_validation_classes_that_training_does_not_know_are_an_error(tmp_path: Path) -> None:
    train = make_folder(tmp_path / "train", per_class=1, classes=("b", "c"))
    val = write(tmp_path / "val", "a/1.png", "b/2.png")
    with pytest.raises(
        ValueError, match=r"no training image has: 1 \(a\); training has 2 \(b, c\)"
    ):
        list_images(job(train, val_source=str(val)))
    names = [f"train/{name}/1.png" for name in "bc"] + [f"val/{name}/2.png" for name in "ab"]
    tree = write(tmp_path / "one", *names)
    with pytest.raises(ValueError, match=r"no training image has: 1 \(a\)"):
        list_images(job(tree))


def test_flat_validation_images_are_unlabelled_and_move_no_label(tmp_path: Path) -> None:
    train = make_folder(tmp_path / "train", per_class=2)
    val = write(tmp_path / "val", "1.png", "2.png", "3.png")
    shard = job(train, val_source=str(val), max_val_images=2)
    assert "shard.val_label_file" in doubts(list_images(shard))
    output = shard_output(tmp_path, shard)
    counts = output.read_json("counts.json")
    assert counts["class_names"] == ["cat", "dog"]
    assert labels(output, "train") == [0, 0, 1, 1]
    assert labels(output, "val") == [-1, -1]
    assert (counts["val"]["class_rows"], counts["val"]["unlabelled_rows"]) == ([0, 0], 2)
    assert (counts["train"]["class_rows"], counts["train"]["unlabelled_rows"]) == ([2, 2], 0)


def test_flat_validation_folder_of_one_tree_is_unlabelled(tmp_path: Path) -> None:
    tree = write(tmp_path / "tree", "train/cat/1.png", "train/dog/2.png", "val/3.png")
    listing = list_images(job(tree))
    assert listing.class_names == ("cat", "dog")
    assert classes(listing, "val") == {"val/3.png": ""}
    assert "shard.val_label_file" in doubts(listing)


@pytest.mark.parametrize("text", ["3.png dog\n", "3 1\n"])
def test_a_label_file_labels_flat_validation(tmp_path: Path, text: str) -> None:
    tree = write(tmp_path / "tree", "train/cat/1.png", "train/dog/2.png", "val/3.png")
    (tmp_path / "val.txt").write_text(text)
    file = str(tmp_path / "val.txt")
    listing = list_images(job(tree, val_label_file=file))
    assert classes(listing, "val") == {"val/3.png": "dog"}
    assert not doubts(listing)
    apart = job(tree / "train", val_source=str(tree / "val"), val_label_file=file)
    listing = list_images(apart)
    assert classes(listing, "val") == {"val/3.png": "dog"}
    assert not doubts(listing)
    assert labels(shard_output(tmp_path, apart), "val") == [1]


def test_a_validation_label_file_without_validation_images_is_an_error(tmp_path: Path) -> None:
    train = make_folder(tmp_path / "train", per_class=1)
    (tmp_path / "val.txt").write_text("1.png cat\n")
    with pytest.raises(ValueError, match=r"val_label_file=.* has no images of its own"):
        list_images(job(train, val_label_file=str(tmp_path / "val.txt")))


def test_a_label_file_labels_flat_training_images(tmp_path: Path) -> None:
    flat = write(tmp_path / "flat", "1.png", "2.png", "3.png")
    (tmp_path / "labels.csv").write_text('name,label\n1,"rose, red"\n2,tulip\n')
    listing = list_images(job(flat, label_file=str(tmp_path / "labels.csv")))
    assert listing.class_names == ("rose, red", "tulip")
    assert classes(listing, "") == {"1.png": "rose, red", "2.png": "tulip"}
    assert listing.rejects == [("3.png", "has no label in the label file")]
    assert "1 images that it does not name" in doubts(listing)


def test_a_label_file_wins_over_folders_that_are_no_classes(tmp_path: Path) -> None:
    tree = write(tmp_path / "tree", "000/1.png", "001/2.png")
    (tmp_path / "labels.txt").write_text("1.png rose\n2.png tulip\n")
    listing = list_images(job(tree, label_file=str(tmp_path / "labels.txt")))
    assert listing.class_names == ("rose", "tulip")
    assert "none of the 2 classes found without it" in doubts(listing)


def test_positions_in_a_label_file_count_the_sorted_folders(tmp_path: Path) -> None:
    tree = write(tmp_path / "tree", "cat/1.png", "dog/2.png")
    (tmp_path / "labels.txt").write_text("cat/1.png 0\ndog/2.png 1\n")
    listing = list_images(job(tree, label_file=str(tmp_path / "labels.txt")))
    assert classes(listing, "") == {"cat/1.png": "cat", "dog/2.png": "dog"}


def test_only_the_wanted_split_of_each_source_is_used(tmp_path: Path) -> None:
    tree = write(tmp_path / "a", "train/cat/1.png", "train/dog/2.png", "val/cat/3.png")
    other = write(tmp_path / "b", "train/cat/4.png", "train/dog/5.png", "val/dog/6.png")
    listing = list_images(job(tree, val_source=str(other)))
    assert list(classes(listing, "train")) == ["train/train/cat/1.png", "train/train/dog/2.png"]
    assert list(classes(listing, "val")) == ["val/val/dog/6.png"]
    reasons = dict(listing.rejects)
    assert "validation of shard.source" in reasons["train/val/cat/3.png"]
    assert "training of shard.val_source" in reasons["val/train/cat/4.png"]
    assert "1 images are left out" in doubts(listing)


def test_what_was_decided_is_in_the_counts_and_told(tmp_path: Path) -> None:
    tree = write(tmp_path / "tree", "flowers/rose/1.png", "flowers/tulip/2.png")
    output = shard_output(tmp_path, job(tree, val_fraction=0.0))
    reading = output.read_json("counts.json")["reading"]
    assert {"text": "classes are folders: 2 (rose, tulip)", "is_doubtful": False} in reading
    assert any(note["is_doubtful"] and "flowers" in note["text"] for note in reading)


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_folder(tmp_path / "photos", per_class=1)
    assert len(list_images(job("~/photos"))) == 2
