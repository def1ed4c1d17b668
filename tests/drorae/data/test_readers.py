import io
import os
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from data_fakes import encoded, make_folder, pixels

from drorae.data.assets.substitutes import write_sheets
from drorae.data.readers.candidates import Candidate, Listing, to_candidates
from drorae.data.readers.cifar import list_cifar
from drorae.data.readers.damage import MAX_IMAGE_BYTES, TOO_LONG
from drorae.data.readers.filesystem import read_content
from drorae.data.readers.source import list_source, read_records
from drorae.store import s3


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            add(archive, name, data)
    return path


def keys_of(listing: Listing) -> list[str]:
    return listing.table["key"].to_pylist()


def keys(uri: Path | str) -> list[str]:
    return keys_of(list_source(str(uri)))


def contents(uri: Path | str) -> dict[str, object]:
    listing = list_source(str(uri))
    return {r.candidate.key: r.data for r in read_records(to_candidates(listing.table))}


def test_folder_gives_sorted_keys_and_classes(tmp_path: Path):
    make_folder(tmp_path / "photos", per_class=2)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    (tmp_path / "photos" / "cat" / "._000.png").write_bytes(b"hidden")
    listing = list_source(str(tmp_path / "photos"))
    expected = ["cat/000.png", "cat/001.png", "dog/000.png", "dog/001.png"]
    assert keys_of(listing) == expected
    assert listing.class_names == ("cat", "dog")
    assert contents(tmp_path / "photos")["cat/000.png"] == encoded(pixels(0))


def test_flat_folder_has_one_class(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(encoded(pixels(0)))
    assert list_source(str(tmp_path)).class_names == ("all",)


def test_image_outside_of_class_folders_is_reported(tmp_path: Path):
    make_folder(tmp_path / "photos", per_class=1)
    (tmp_path / "photos" / "stray.png").write_bytes(encoded(pixels(9)))
    rejects = list_source(str(tmp_path / "photos")).rejects
    assert rejects == [("stray.png", "lies outside of every class folder")]


def test_symbolic_link_loops_and_broken_links_are_reported(tmp_path: Path):
    root = make_folder(tmp_path / "photos", per_class=1)
    (root / "cat" / "again").symlink_to(root)
    (root / "cat" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "bird").symlink_to(root / "dog")
    listing = list_source(str(root))
    assert ("cat/again", "symbolic link loop") in listing.rejects
    assert ("cat/gone.png", "broken symbolic link") in listing.rejects
    assert keys_of(listing) == ["bird/000.png", "cat/000.png", "dog/000.png"]


def test_a_pipe_is_reported_and_not_waited_for(tmp_path: Path):
    root = make_folder(tmp_path / "photos", per_class=1)
    os.mkfifo(root / "cat" / "pipe.png")
    rejects = list_source(str(root)).rejects
    assert rejects == [("cat/pipe.png", "a device, a pipe or a socket, not a file")]


def test_a_file_longer_than_any_picture_is_not_read(tmp_path: Path):
    root = make_folder(tmp_path / "photos", per_class=1)
    (root / "cat" / "backup").touch()
    os.truncate(root / "cat" / "backup", MAX_IMAGE_BYTES + 1)
    records = {
        r.candidate.key: r for r in read_records(to_candidates(list_source(str(root)).table))
    }
    assert records["cat/backup"].error == f"cannot be read: {TOO_LONG}"
    assert records["cat/000.png"].data


def test_file_name_that_is_no_unicode_is_readable(tmp_path: Path):
    root = make_folder(tmp_path / "photos", per_class=1)
    with open(bytes(root / "cat") + b"/\xff.png", "wb") as file:
        file.write(encoded(pixels(7)))
    found = contents(root)
    key = next(key for key in found if "udcff" in key)
    assert key.isascii()
    assert found[key] == encoded(pixels(7))


def test_unreadable_file_gives_a_record_with_an_error(tmp_path: Path):
    gone = Candidate("a.png", "cat", "", "file", str(tmp_path / "a.png"))
    record = next(iter(read_records([gone])))
    assert record.data is None
    assert "No such file" in record.error


def test_missing_source_names_what_is_expected(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"does not exist: expected a folder, .tar"):
        list_source(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"does not exist: expected a folder, .tar"):
        list_source(str(tmp_path / "nowhere.tar"))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="is a file of no known kind"):
        list_source(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize("kind", ["file", "tar", "zip", "parquet"])
def test_a_store_that_fails_ends_the_stage_instead_of_rejecting_images(
    kind: str, monkeypatch: pytest.MonkeyPatch
):
    class Refusing:
        def open(self, path: str, mode: str, **options: object) -> None:
            raise PermissionError("Forbidden")

        def cat_file(self, path: str, **limits: object) -> None:
            raise PermissionError("Forbidden")

    monkeypatch.setattr(s3, "filesystem", Refusing)
    there = Candidate("a.png", "cat", "", kind, "s3://bucket/a", size_bytes=9)
    with pytest.raises(RuntimeError, match="s3://bucket/a"):
        list(read_records([there]))


def test_source_without_images_is_an_error(tmp_path: Path):
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(ValueError, match="holds no image"):
        list_source(str(tmp_path))


def test_folder_of_tar_files_is_one_source(tmp_path: Path):
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", {"./cat/1.png": encoded(pixels(0))})
    assert keys(tmp_path) == ["a.tar/cat/1.png", "b.tar/cat/1.png"]
    assert list_source(str(tmp_path)).class_names == ("cat",)


def test_cifar_sheets_keep_splits_labels_and_pixels(tmp_path: Path):
    train = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    write_sheets(tmp_path, "train", train, [3] * 10)
    write_sheets(tmp_path, "val", train[:2], [9, 0])
    listing = list_cifar(str(tmp_path))
    assert [c.split for c in to_candidates(listing.table)] == ["train"] * 10 + ["val"] * 2
    assert to_candidates(listing.table)[-2].class_name == "truck"
    read = [r.data for r in read_records(to_candidates(listing.table))]
    np.testing.assert_array_equal(np.stack(read[:10]), train)


def test_cifar_labels_that_do_not_fit_the_sheets_are_an_error(tmp_path: Path):
    (tmp_path / "train_lables.json").write_text("[1, 2, 3]")
    with pytest.raises(ValueError, match="multiple of the"):
        list_cifar(str(tmp_path))


def test_folder_that_cannot_be_entered_is_reported(tmp_path: Path, monkeypatch):
    import os

    root = make_folder(tmp_path / "photos", per_class=1)
    real = os.scandir

    def scandir(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert ("dog", "folder cannot be read: Permission denied") in list_source(str(root)).rejects


def test_remote_sources_go_through_fsspec(tmp_path: Path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/photos/cat/1.png", encoded(pixels(0)))
    memory.pipe_file("/photos/.hidden/1.png", b"x")
    assert keys("memory://photos") == ["cat/1.png"]
    assert contents("memory://photos")["cat/1.png"] == encoded(pixels(0))
    with pytest.raises(FileNotFoundError, match="does not exist or is empty"):
        list_source("memory://nothing")


def test_a_length_that_lies_reserves_no_memory(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"content")
    tracemalloc.start()
    try:
        assert read_content(str(path), 3, 1 << 30) == b"tent"
        assert read_content(str(path), 99, 1 << 30) == b""
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
