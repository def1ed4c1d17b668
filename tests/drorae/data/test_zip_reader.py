import io
import json
import random
import stat
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from reader_fakes import check_damage, contents_of, labels_of, texts_of

from drorae.data.readers import damage, zipped
from drorae.data.readers.candidates import Candidate, Listing, ReadRule, to_candidates
from drorae.data.readers.source import read_records
from drorae.data.readers.zipped import list_zip

NAME = "set.zip"


def write_zip(path: Path, members: Mapping[str, bytes | str], method: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def listing_of(path: Path, **rule: object) -> Listing:
    return list_zip(str(path), path.name, ReadRule(**rule))


def listed(tmp_path: Path, members: Mapping[str, bytes | str], **rule: object) -> Listing:
    return listing_of(write_zip(tmp_path / NAME, members), **rule)


def changed(path: Path, old: bytes, new: bytes, count: int = -1) -> Path:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, count))
    return path


def reasons(listing: Listing) -> dict[str, str]:
    return {key.removeprefix(f"{NAME}/"): reason for key, reason in listing.rejects}


def test_images_are_rows_and_hidden_ones_are_counted(tmp_path: Path):
    members = {
        "top/": b"",
        "top/cat/1.png": b"1",
        "./top//dog/2.JPG": b"2",
        "__MACOSX/top/cat/1.png": b"x",
        "top/.cache/1.png": b"x",
        "top/cat/nosuffix": b"3",
        "top/cat/1.txt": b"x",
    }
    listing = listed(tmp_path, members | {"readme.md": b"x"})
    assert contents_of(listing) == {
        "set.zip/top/cat/1.png": b"1",
        "set.zip/top/dog/2.JPG": b"2",
        "set.zip/top/cat/nosuffix": b"3",
    }
    assert "files beside images are no images: 1 .txt" in texts_of(listing)
    assert reasons(listing) == {"readme.md": "not an image by its name"}
    assert "2 hidden images are left out" in texts_of(listing)
    assert not listing.has_stated_labels


def test_backslashes_are_separators_and_keys_keep_them(tmp_path: Path):
    members = {r"rose\0.png": b"0", r"tulip\0.png": b"1", r"rose\.hidden.png": b"x"}
    listing = listed(tmp_path, members | {"tulip/0.png": b"2"})
    assert contents_of(listing) == {r"set.zip/rose\0.png": b"0", "set.zip/tulip/0.png": b"2"}
    assert reasons(listing) == {r"tulip\0.png": "replaced by a later member of the same name"}


@pytest.mark.parametrize("raw", ["\u00e9t\u00e9".encode(), "\u00e9t\u00e9".encode("cp437")])
def test_names_without_the_utf8_flag_are_utf8_if_they_can_be(tmp_path: Path, raw: bytes):
    path = write_zip(tmp_path / NAME, {f"{'x' * len(raw)}/0.png": b"0"})
    listing = listing_of(changed(path, b"x" * len(raw), raw))
    assert contents_of(listing) == {"set.zip/\u00e9t\u00e9/0.png": b"0"}


def test_the_last_member_of_a_name_counts(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(tmp_path / NAME, "w") as archive:
            archive.writestr("1.png", b"old")
            archive.writestr("1.png", b"new")
    listing = listing_of(tmp_path / NAME)
    assert contents_of(listing) == {"set.zip/1.png": b"new"}
    assert reasons(listing) == {"1.png": "replaced by a later member of the same name"}


def test_the_labels_of_stylegan_are_read(tmp_path: Path):
    labels = [["00000/a.png", 6], [r"00000\b.png", 9], ["00001/c.png", 0.5], ["gone.png", 1]]
    members = {f"00000/{name}.png": name.encode() for name in "ab"}
    members |= {"00001/c.png": b"c", "00001/d.png": b"d"}
    listing = listed(tmp_path, members | {"dataset.json": json.dumps({"labels": labels})})
    assert labels_of(listing) == {"a.png": "6", "b.png": "9", "d.png": ""}
    assert reasons(listing) == {"00001/c.png": "has no label: label 0.5 is no whole number"}
    assert listing.has_stated_labels
    assert "such as 'gone.png'?" in texts_of(listing)


def test_metadata_files_in_folders_are_read(tmp_path: Path):
    lines = '{"file_name": "a.png", "label": "cat"}\n'
    listing = listed(tmp_path, {"train/a.png": b"a", "train/metadata.jsonl": lines})
    assert labels_of(listing) == {"a.png": "cat"}


def test_a_damaged_label_file_is_one_clear_error(tmp_path: Path):
    path = write_zip(tmp_path / NAME, {"a.png": b"a", "dataset.json": "{broken"})
    with pytest.raises(ValueError, match=r"set\.zip.*'dataset.json'.*cannot be read"):
        listing_of(path)
    changed(path, b"{broken", b"{Broken")
    with pytest.raises(ValueError, match=r"'dataset.json'.*cannot be read \(Bad CRC"):
        listing_of(path)


def test_a_label_file_that_is_too_long_is_not_read(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(zipped, "MAX_LABEL_BYTES", 1 << 20)
    path = tmp_path / NAME
    write_zip(path, {"a.png": b"a", "dataset.json": " " * (2 << 20)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="2097152 bytes, more than 1 MiB"):
        listing_of(path)


def test_a_member_longer_than_any_picture_is_not_unpacked(tmp_path: Path, monkeypatch):
    path = write_zip(tmp_path / NAME, {"a.png": b"\0" * 5000}, zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(zipped, "MAX_IMAGE_BYTES", 4000)
    assert reasons(listing_of(path)) == {"a.png": damage.TOO_LONG}
    # The directory lies about it.
    changed(path, struct.pack("<L", 5000), struct.pack("<L", 10))
    assert "no picture is" in contents_of(listing_of(path))["set.zip/a.png"]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_compression_is_undone_and_the_crc_checked(tmp_path: Path, method: int):
    data = random.Random(0).randbytes(300) * 3
    path = write_zip(tmp_path / NAME, {"1.png": data, "2.png": data[::-1]}, method)
    assert list(contents_of(listing_of(path)).values()) == [data, data[::-1]]
    content = bytearray(path.read_bytes())
    content[60] ^= 0xFF
    path.write_bytes(bytes(content))
    first, second = contents_of(listing_of(path)).values()
    assert str(first).startswith("zip member cannot be read")
    assert second == data[::-1]


def test_members_written_as_a_stream_are_read(tmp_path: Path):
    class Unseekable(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def tell(self) -> int:
            raise OSError

    buffer = Unseekable()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("1.png", b"one")
        with archive.open("2.png", "w", force_zip64=True) as member:
            member.write(b"two")
    (tmp_path / NAME).write_bytes(buffer.getvalue())
    assert list(contents_of(listing_of(tmp_path / NAME)).values()) == [b"one", b"two"]


def test_links_archives_and_encrypted_members_are_named(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / NAME, "w") as archive:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "1.png")
        archive.writestr("inner.tar", b"x")
        archive.writestr("1.png", b"1")
    found = reasons(listing_of(tmp_path / NAME))
    assert set(found) == {"link.png", "inner.tar"}
    assert "symbolic link" in found["link.png"]
    header = b"PK\x03\x04\x14\0"
    changed(tmp_path / NAME, header + b"\0", header + b"\x01")
    assert "it is encrypted" in str(contents_of(listing_of(tmp_path / NAME)))


def test_a_name_that_differs_from_the_header_is_an_error(tmp_path: Path):
    path = write_zip(tmp_path / NAME, {"cat/1.png": b"1"})
    changed(path, b"cat/1.png", b"dog/1.png", 1)
    assert "its name differs" in contents_of(listing_of(path))["set.zip/cat/1.png"]


def test_a_damaged_directory_is_one_reject(tmp_path: Path):
    (tmp_path / NAME).write_bytes(b"nothing")
    assert "is damaged: File is not a zip file" in reasons(listing_of(tmp_path / NAME))[NAME]
    path = write_zip(tmp_path / NAME, {"1.png": b"1", "2.png": b"2"})
    changed(path, b"\x02\0\x02\0", b"\x03\0\x03\0")
    listing = listing_of(path)
    assert len(listing) == 2
    assert "it states 3 members and lists 2" in reasons(listing)[NAME]
    path.unlink()
    assert "No such file" in reasons(listing_of(path))[NAME]


def test_a_member_without_a_name_is_a_reject(tmp_path: Path):
    data = bytearray(write_zip(tmp_path / NAME, {"1": b"1", "2.png": b"2"}).read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 28], data[entry + 30] = 0, 1  # its name is taken for its extra field
    (tmp_path / NAME).write_bytes(bytes(data))
    listing = listing_of(tmp_path / NAME)
    assert contents_of(listing) == {"set.zip/2.png": b"2"}
    assert reasons(listing) == {"": "a member without a name"}


def test_a_zip_that_vanished_gives_errors(tmp_path: Path):
    gone = Candidate("k", "c", "", "zip", str(tmp_path / "gone.zip"), member="a")
    assert next(iter(read_records([gone]))).error


@pytest.mark.parametrize("seed", range(6))
def test_random_archives_give_exactly_what_was_put_in(tmp_path: Path, seed: int):
    draw = random.Random(seed)
    letters = ["a", "B", "\u00e9", "\u6f22", "x y", "0"]
    known: dict[str, bytes] = {}
    labels: list[tuple[str, int]] = []
    with zipfile.ZipFile(tmp_path / NAME, "w") as archive:
        for number in range(draw.randint(1, 60)):
            folders = "".join(f"{draw.choice(letters)}/" for _ in range(draw.randint(0, 3)))
            name = f"{folders}{number}.{draw.choice(['jpg', 'PNG', 'webp'])}"
            known[name] = draw.randbytes(draw.choice((0, 1, 513, 3000)))
            labels.append((name, draw.randint(0, 5)))
            archive.writestr(name, known[name], draw.choice((0, zipfile.ZIP_DEFLATED)))
            archive.writestr(f"{folders}{number}.txt", "caption")
        if seed % 2:
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    listing = listing_of(tmp_path / NAME)
    assert contents_of(listing) == {f"set.zip/{name}": data for name, data in known.items()}
    assert not listing.rejects
    found = {c.key.removeprefix("set.zip/"): c.class_name for c in to_candidates(listing.table)}
    assert found == {name: str(label) if seed % 2 else "" for name, label in labels}


def test_any_damage_gives_rejects_or_good_rows(tmp_path: Path):
    members = {f"cat/{n}.png": random.Random(n).randbytes(80) + b"\0" * 200 for n in range(3)}
    labels = json.dumps({"labels": [[name, 3] for name in members]})
    write_zip(tmp_path / NAME, members | {"dataset.json": labels}, zipfile.ZIP_DEFLATED)
    known = {f"set.zip/{name}": data for name, data in members.items()}
    check_damage(list_zip, tmp_path / NAME, (tmp_path / NAME).read_bytes(), known)


def test_names_in_no_known_encoding_are_told(tmp_path: Path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("XX/0.png"), b"0")
        archive.writestr(zipfile.ZipInfo("cat/0.png"), b"1")
    path.write_bytes(path.read_bytes().replace(b"XX/", "狗".encode("gbk") + b"/"))
    notes = list_zip(str(path), path.name, ReadRule()).notes
    assert ["1 names are not in UTF-8" in note.text for note in notes if note.is_doubtful] == [True]
