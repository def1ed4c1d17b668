import json
import random
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from data_fakes import encoded, job, pixels, shard_output
from reader_fakes import (
    add,
    check_damage,
    contents_of,
    labels_of,
    texts_of,
    write_tar,
)

from drorae.data.readers.candidates import Listing, ReadRule, to_candidates
from drorae.data.readers.source import read_records
from drorae.data.readers.tar import list_tar
from drorae.data.shard_files import source_span

NAME = "set.tar"


def listing_of(path: Path, **rule: object) -> Listing:
    return list_tar(str(path), path.name, ReadRule(**rule))


def listed(tmp_path: Path, members: dict[str, bytes], **rule: object) -> Listing:
    return listing_of(write_tar(tmp_path / NAME, members), **rule)


def reasons(listing: Listing) -> dict[str, str]:
    return {key.rpartition("/")[2]: reason for key, reason in listing.rejects}


@pytest.mark.parametrize(
    ("label", "text"),
    [
        (b"10", "10"),
        (b"\xef\xbb\xbf 7\r\n", "7"),
        (b"tabby cat\n", "tabby cat"),
        (b"6.0", "6"),
        (b"-1", ""),
        (b"", ""),
    ],
)
def test_a_member_cls_is_the_label(tmp_path: Path, label: bytes, text: str):
    listing = listed(tmp_path, {"a.jpg": b"A", "a.cls": label, "b.jpg": b"B", "b.CLS": b"3"})
    assert labels_of(listing) == {"a.jpg": text, "b.jpg": "3"}
    assert listing.has_stated_labels
    assert contents_of(listing) == {"set.tar/a.jpg": b"A", "set.tar/b.jpg": b"B"}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"label": 2}, "2"),
        ({"label": 2.0}, "2"),
        ({"label": 10**400}, str(10**400)),
        ({"label": None}, ""),
        ({"label": None, "class_name": "cat"}, "cat"),
        ({"caption": "a cat"}, ""),
        ([1], None),
        ({"label": [1, 2]}, None),
        ({"label": True}, None),
        ({"label": 0.5}, None),
        ({"label": {"id": 1}}, None),
    ],
)
def test_json_beside_an_image_gives_its_label_or_a_reason(tmp_path: Path, content, text):
    members = {"a.jpg": b"A", "a.json": json.dumps(content).encode(), "b.jpg": b"B", "b.cls": b"0"}
    listing = listed(tmp_path, members)
    assert labels_of(listing) == ({"b.jpg": "0"} if text is None else {"a.jpg": text, "b.jpg": "0"})
    if text is None:
        assert reasons(listing)["a.jpg"].startswith("has no label: label")


def test_damaged_json_is_a_reason_unless_another_member_states_the_label(tmp_path: Path):
    members = {"a.jpg": b"A", "a.json": b"{broken", "b.jpg": b"B", "b.json": b"[", "b.cls": b"0"}
    listing = listed(tmp_path, members)
    assert labels_of(listing) == {"b.jpg": "0"}
    assert "a.json is damaged" in reasons(listing)["a.jpg"]


def test_an_image_without_a_label_among_others_has_no_class_and_no_folder(tmp_path: Path):
    listing = listed(tmp_path, {"train/1.jpg": b"1", "train/1.cls": b"5", "train/2.jpg": b"2"})
    assert labels_of(listing) == {"1.jpg": "5", "2.jpg": ""}
    assert listing.has_stated_labels


def test_an_archive_without_labels_states_none(tmp_path: Path):
    members = {"cat/1.jpg": b"1", "dog/photo.v1.jpg": b"2", "cat/nosuffix": b"3", "notes.txt": b""}
    listing = listed(tmp_path, members)
    assert labels_of(listing) == {"1.jpg": "", "photo.v1.jpg": "", "nosuffix": ""}
    assert not listing.has_stated_labels
    assert not listing.notes


def test_names_with_dots_have_labels_of_their_own(tmp_path: Path):
    members = {f"photo.v{n}.{end}": b"%d" % n for n in (1, 2) for end in ("jpg", "cls")}
    members["photo.v3.JPG"] = b"3"
    assert labels_of(listed(tmp_path, members)) == {
        "photo.v1.jpg": "1",
        "photo.v2.jpg": "2",
        "photo.v3.JPG": "",
    }


def test_a_mask_beside_an_image_is_counted_and_is_no_image(tmp_path: Path):
    members = {}
    for n in range(4):
        members |= {f"{n}.jpg": b"J", f"{n}.mask.png": b"M", f"{n}.cls": b"%d" % n}
    listing = listed(tmp_path, members)
    assert labels_of(listing) == {f"{n}.jpg": str(n) for n in range(4)}
    assert "4 members .mask.png beside the image of their sample are no images" in texts_of(listing)


def test_members_of_unknown_kind_are_parts_of_samples_or_rejects(tmp_path: Path):
    members = {"1.jpg": b"J", "1.cls": b"1", "1.depth": b"D", "2.picture": b"P", "2.cls": b"2"}
    listing = listed(tmp_path, members)
    assert labels_of(listing) == {"1.jpg": "1"}
    assert "1 members .depth beside the image of their sample are no images" in texts_of(listing)
    reason = "not an image by its name; shard.image_key names the extension of images"
    assert reasons(listing) == {"2.picture": reason}
    assert labels_of(listed(tmp_path, members, image_key="picture")) == {"2.picture": "2"}


def test_the_image_key_names_the_image(tmp_path: Path):
    members = {"1.jpg": b"J", "1.mask.png": b"M", "1.cls": b"1", "2.jpg": b"K", "2.cls": b"2"}
    listing = listed(tmp_path, members, image_key="mask.PNG")
    assert contents_of(listing) == {"set.tar/1.mask.png": b"M"}
    assert reasons(listing) == {"2.jpg": "its sample has no member .mask.png (shard.image_key)"}
    listing = listed(tmp_path, {"1.input": b"I", "1.png": b"P", "1.cls": b"1"}, image_key=".input")
    assert contents_of(listing) == {"set.tar/1.input": b"I"}
    assert "1 members .png" in texts_of(listing)


@pytest.mark.parametrize(
    ("key", "text"), [("cls", "1"), ("fine", "2"), ("about.id", "3"), ("label.txt", "4")]
)
def test_the_label_key_names_the_label(tmp_path: Path, key: str, text: str):
    members = {
        "1.jpg": b"J",
        "1.cls": b"1",
        "1.label.txt": b"4",
        "1.json": json.dumps({"fine": 2, "about": {"id": 3}, "label": 9}).encode(),
    }
    assert labels_of(listed(tmp_path, members, label_key=key)) == {"1.jpg": text}


def test_a_label_key_that_nothing_has_leaves_images_without_label(tmp_path: Path):
    listing = listed(tmp_path, {"cat/1.jpg": b"J", "cat/1.cls": b"1"}, label_key="clas")
    assert labels_of(listing) == {"1.jpg": ""}
    assert listing.has_stated_labels
    assert "shard.label_key names" in texts_of(listing)


def test_json_that_states_no_label_is_told(tmp_path: Path):
    listing = listed(tmp_path, {"cat/1.jpg": b"J", "cat/1.json": b'{"label": null}'})
    assert not listing.has_stated_labels
    assert "1 members .cls or .json state no label" in texts_of(listing)


def test_one_image_of_several_parts_is_taken_with_a_doubt(tmp_path: Path):
    listing = listed(tmp_path, {"1.photo.jpg": b"J", "1.cls": b"1"})
    assert labels_of(listing) == {"1.photo.jpg": "1"}
    assert "shard.image_key names the extension of images?" in texts_of(listing)


def test_several_images_of_several_parts_are_rejected(tmp_path: Path):
    listing = listed(tmp_path, {"1.left.jpg": b"L", "1.right.jpg": b"R", "1.cls": b"1"})
    assert not len(listing)
    assert set(reasons(listing)) == {"1.left.jpg", "1.right.jpg"}
    assert all("shard.image_key" in reason for reason in reasons(listing).values())


def test_of_two_images_in_one_sample_the_first_is_taken(tmp_path: Path):
    listing = listed(tmp_path, {"1.png": b"P", "1.jpg": b"J", "1.cls": b"1"})
    assert contents_of(listing) == {"set.tar/1.png": b"P"}
    assert "its sample has the image 1.png too" in reasons(listing)["1.jpg"]
    assert "of which the first is taken" in texts_of(listing)


def test_labels_without_an_image_are_told(tmp_path: Path):
    listing = listed(tmp_path, {"1.jpg": b"J", "1.cls": b"1", "2.cls": b"2"})
    assert "1 labels have no image beside them, such as 2.cls?" in texts_of(listing)


def test_links_give_the_bytes_of_their_target(tmp_path: Path):
    with tarfile.open(tmp_path / NAME, "w") as archive:
        symbolic, hard = tarfile.SYMTYPE, tarfile.LNKTYPE
        add(archive, "a/later.png", type=symbolic, linkname="../blobs/x")
        add(archive, "blobs/x", b"X")
        add(archive, "a/hard.png", type=hard, linkname="./blobs/x")
        add(archive, "a/chain.png", type=symbolic, linkname="hard.png")
        add(archive, "now", type=symbolic, linkname="blobs")
        add(archive, "a/folder.png", type=symbolic, linkname="../now/x")
        add(archive, "a/gone.png", type=symbolic, linkname="nowhere.png")
        add(archive, "a/out.png", type=symbolic, linkname="../../x")
        add(archive, "a/root.png", type=symbolic, linkname="/blobs/x")
        add(archive, "a/loop.png", type=symbolic, linkname="loop.png")
    listing = listing_of(tmp_path / NAME)
    good = ("later", "hard", "chain", "folder")
    assert contents_of(listing) == {f"set.tar/a/{name}.png": b"X" for name in good}
    assert reasons(listing) == {
        f"{name}.png": f"link to {target}, which is no file of the archive"
        for name, target in {
            "gone": "nowhere.png",
            "out": "../../x",
            "root": "/blobs/x",
            "loop": "loop.png",
        }.items()
    } | {"now": "link to blobs, which is no file of the archive"}


def test_labels_may_be_links(tmp_path: Path):
    with tarfile.open(tmp_path / NAME, "w") as archive:
        add(archive, "1.jpg", b"J")
        add(archive, "1.cls", type=tarfile.SYMTYPE, linkname="labels/seven")
        add(archive, "labels/seven", b"7")
        add(archive, "2.jpg", b"K")
        add(archive, "2.cls", type=tarfile.LNKTYPE, linkname="labels/seven")
    assert labels_of(listing_of(tmp_path / NAME)) == {"1.jpg": "7", "2.jpg": "7"}


def test_a_hard_link_keeps_the_file_that_was_replaced_later(tmp_path: Path):
    with tarfile.open(tmp_path / NAME, "w") as archive:
        add(archive, "1.png", b"old")
        add(archive, "2.png", type=tarfile.LNKTYPE, linkname="1.png")
        add(archive, "1.png", b"new")
    listing = listing_of(tmp_path / NAME)
    assert contents_of(listing) == {"set.tar/2.png": b"old", "set.tar/1.png": b"new"}


def test_the_last_member_of_a_name_counts(tmp_path: Path):
    with tarfile.open(tmp_path / NAME, "w") as archive:
        for name, data in [
            ("1.png", b"old"),
            ("1.cls", b"4"),
            ("./1.png", b"new"),
            (".//1.cls", b"5"),
        ]:
            add(archive, name, data)
    listing = listing_of(tmp_path / NAME)
    assert contents_of(listing) == {"set.tar/1.png": b"new"}
    assert labels_of(listing) == {"1.png": "5"}
    assert listing.rejects == [("set.tar/1.png", "replaced by a later member of the same name")]


def sparse_picture() -> bytes:
    content = bytearray(5000)
    content[512:600] = bytes(range(88))
    content[4096:4200] = b"z" * 104
    return bytes(content)


@pytest.mark.parametrize("as_pax", [True, False])
def test_sparse_members_are_read_whole_and_not_by_range(tmp_path: Path, as_pax: bool):
    content = sparse_picture()
    stored = content[512:600] + content[4096:4200]
    with tarfile.open(tmp_path / NAME, "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "0.png", b"first")
        if as_pax:
            head = b"2\n512\n88\n4096\n104\n".ljust(512, b"\0")
            fields = {
                "GNU.sparse.major": "1",
                "GNU.sparse.minor": "0",
                "GNU.sparse.name": "1.png",
                "GNU.sparse.realsize": "5000",
            }
            add(archive, "GNUSparseFile.7/1.png", head + stored, pax_headers=fields)
        else:
            archive.fileobj.write(old_gnu_sparse("1.png", [(512, 88), (4096, 104)], 5000, stored))
        add(archive, "2.png", b"last")
    listing = listing_of(tmp_path / NAME)
    expected = {"0.png": b"first", "1.png": content, "2.png": b"last"}
    assert contents_of(listing) == {f"set.tar/{name}": data for name, data in expected.items()}
    spans = [source_span(candidate) for candidate in to_candidates(listing.table)]
    assert [span is None for span in spans] == [False, True, False]


def old_gnu_sparse(name: str, pieces: list[tuple[int, int]], size: int, stored: bytes) -> bytes:
    header = bytearray(512)
    header[: len(name)] = name.encode()
    header[124:136] = b"%011o\0" % len(stored)
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[257:265] = b"ustar  \0"
    for number, (offset, length) in enumerate(pieces):
        header[386 + 24 * number : 410 + 24 * number] = b"%011o\0%011o\0" % (offset, length)
    header[483:495] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + stored.ljust(-len(stored) // 512 * -512, b"\0")


def test_shards_hold_sparse_pictures_whole(tmp_path: Path):
    pictures = []
    with tarfile.open(tmp_path / NAME, "w") as archive:
        for number in range(4):
            picture = pixels(number)
            picture[5:12] = 0
            content = encoded(picture, "BMP")
            start = content.index(b"\0" * 300)
            stored = content[:start] + content[start + 300 :]
            pieces = [(0, start), (start + 300, len(content) - start - 300)]
            archive.fileobj.write(old_gnu_sparse(f"{number}.bmp", pieces, len(content), stored))
            pictures.append(content)
        archive.offset = archive.fileobj.tell()
    output = shard_output(tmp_path / "out", job(tmp_path / NAME, pictures="source", val_fraction=0))
    tables = [pa.ipc.open_file(path).read_all() for path in Path(output.uri).glob("*/part-*.arrow")]
    assert sorted(pa.concat_tables(tables)["image"].to_pylist()) == sorted(pictures)


def test_what_is_no_file_is_rejected_by_name(tmp_path: Path):
    with tarfile.open(tmp_path / NAME, "w") as archive:
        add(archive, "pipe.png", type=tarfile.FIFOTYPE)
        add(archive, "disk.png", type=tarfile.BLKTYPE)
        add(archive, "odd.png", b"x", type=b"M")
        add(archive, "folder.png", type=tarfile.DIRTYPE)
        add(archive, "inner.tar.gz", b"x")
        add(archive, "good.png", b"G")
    listing = listing_of(tmp_path / NAME)
    assert contents_of(listing) == {"set.tar/good.png": b"G"}
    assert set(reasons(listing)) == {"pipe.png", "disk.png", "odd.png", "inner.tar.gz"}
    assert "unpack it" in reasons(listing)["inner.tar.gz"]


def test_odd_names_are_harmless_and_keys_unique(tmp_path: Path):
    names = ["/abs/1.png", "../up/2.png", "a//b/./3.png", "c\\4.png", "\udcff5.png", "e\u0301.png"]
    with tarfile.open(tmp_path / NAME, "w", format=tarfile.GNU_FORMAT) as archive:
        for name in [*names, "a/.b/6.png", "__MACOSX/7.png"]:
            add(archive, name, name.encode("utf-8", "surrogateescape"))
    listing = listing_of(tmp_path / NAME)
    keys = [c.key for c in to_candidates(listing.table)]
    assert keys[:4] == [f"set.tar/{k}" for k in ("abs/1.png", "up/2.png", "a/b/3.png", "c\\4.png")]
    assert len(set(keys)) == 6
    assert list(contents_of(listing).values())[5] == "e\u0301.png".encode()
    assert "2 hidden images are left out" in texts_of(listing)


def test_joined_archives_are_read_to_the_end(tmp_path: Path):
    first = write_tar(tmp_path / "a.tar", {"1.png": b"1"}).read_bytes()
    second = write_tar(tmp_path / "b.tar", {"2.png": b"2"}).read_bytes()
    (tmp_path / NAME).write_bytes(first + second)
    listing = listing_of(tmp_path / NAME)
    assert contents_of(listing) == {"set.tar/1.png": b"1", "set.tar/2.png": b"2"}
    assert "tar archive is 2 joined ones: all are read?" in texts_of(listing)


def test_an_archive_that_is_cut_off_keeps_what_was_read(tmp_path: Path):
    members = {f"{n}.png": random.Random(n).randbytes(700) for n in range(3)}
    whole = write_tar(tmp_path / NAME, members).read_bytes()
    (tmp_path / NAME).write_bytes(whole[:4200])
    listing = listing_of(tmp_path / NAME)
    assert list(contents_of(listing).values()) == list(members.values())[:2]
    assert reasons(listing) == {
        "2.png": "truncated: the archive ends inside it",
        "set.tar": "tar archive is damaged from byte 4200: the archive ends inside '2.png', its "
        "length is 4200 bytes",
    }
    (tmp_path / NAME).write_bytes(whole[:3072])
    assert "no end mark: it may be cut off?" in texts_of(listing_of(tmp_path / NAME))


def test_a_damaged_header_ends_the_archive_with_its_place(tmp_path: Path):
    write_tar(tmp_path / NAME, {"1.png": b"1", "2.png": b"2"})
    data = bytearray((tmp_path / NAME).read_bytes())
    data[1024 + 5] ^= 0xFF
    (tmp_path / NAME).write_bytes(bytes(data))
    listing = listing_of(tmp_path / NAME)
    assert contents_of(listing) == {"set.tar/1.png": b"1"}
    assert "damaged from byte 1024" in reasons(listing)["set.tar"]


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_archives_are_one_reject_that_says_what_to_do(tmp_path: Path, mode: str):
    listing = listing_of(write_tar(tmp_path / NAME, {"1.png": b"1"}, mode))
    assert not len(listing)
    assert len(listing.rejects) == 1
    assert "is compressed" in listing.rejects[0][1]
    assert "Unpack it" in listing.rejects[0][1]


def test_archives_that_are_empty_gone_or_of_another_kind_are_rejects(tmp_path: Path):
    (tmp_path / NAME).write_bytes(b"")
    assert reasons(listing_of(tmp_path / NAME)) == {NAME: "tar archive is empty (0 bytes)"}
    (tmp_path / NAME).write_bytes(b"hello" * 300)
    assert "damaged from byte 0" in reasons(listing_of(tmp_path / NAME))[NAME]
    (tmp_path / NAME).unlink()
    assert "No such file" in reasons(listing_of(tmp_path / NAME))[NAME]


def test_a_tar_that_vanished_gives_errors(tmp_path: Path):
    listing = listed(tmp_path, {"1.png": b"1"})
    (tmp_path / NAME).unlink()
    assert "No such file" in next(iter(read_records(to_candidates(listing.table)))).error


@pytest.mark.parametrize("seed", range(6))
def test_random_archives_give_exactly_what_was_put_in(tmp_path: Path, seed: int):
    draw = random.Random(seed)
    form = draw.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    letters = ["a", "B", "\u00e9", "\u6f22", "x y", "n" * draw.choice((3, 60)), "0"]
    known: dict[str, bytes] = {}
    labels: dict[str, str] = {}
    with tarfile.open(tmp_path / NAME, "w", format=form) as archive:
        for number in range(draw.randint(1, 60)):
            folders = "".join(f"{draw.choice(letters)}/" for _ in range(draw.randint(0, 3)))
            name = f"{folders}{draw.choice(letters)}{number}"
            image = f"{name}.{draw.choice(['jpg', 'PNG', 'webp'])}"
            data = draw.randbytes(draw.choice((0, 1, 511, 512, 513, 3000)))
            label = str(draw.randint(0, 5))
            stated = {f"{name}.{draw.choice(['cls', 'CLS'])}": label.encode(), image: data}
            for member in draw.sample(sorted(stated), 2):
                add(archive, member, stated[member])
            add(archive, f"{name}.txt", b"a caption")
            known[f"set.tar/{image}"], labels[f"set.tar/{image}"] = data, label
    listing = listing_of(tmp_path / NAME)
    assert contents_of(listing) == known
    assert {c.key: c.class_name for c in to_candidates(listing.table)} == labels
    assert not listing.rejects


def test_any_damage_gives_rejects_or_good_rows(tmp_path: Path):
    with tarfile.open(tmp_path / NAME, "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, f"{'long' * 30}.png", b"P" * 600)
        add(archive, "1.png", b"J" * 30)
        add(archive, "1.cls", b"1")
        add(archive, "2.png", type=tarfile.SYMTYPE, linkname="1.png")
        archive.fileobj.write(old_gnu_sparse("3.png", [(0, 8)], 99, b"Q" * 8))
    check_damage(list_tar, tmp_path / NAME, (tmp_path / NAME).read_bytes(), {})


def test_label_files_inside_state_labels(tmp_path: Path):
    names = [f"00000/{number}.png" for number in range(3)]
    pairs = json.dumps({"labels": [[names[0], 3], [names[1], 1], [names[2], [1]]]}).encode()
    with tarfile.open(tmp_path / NAME, "w") as archive:
        for number, name in enumerate(names):
            add(archive, name, b"%d" % number)
        add(archive, "dataset.json", pairs)
    listing = listing_of(tmp_path / NAME)
    assert [c.class_name for c in to_candidates(listing.table)] == ["3", "1"]
    assert listing.has_stated_labels
    assert "has no label: label '[1]'" in str(reasons(listing))


def test_labels_beside_images_come_before_label_files(tmp_path: Path):
    with tarfile.open(tmp_path / NAME, "w") as archive:
        add(archive, "0.png", b"0")
        add(archive, "0.cls", b"7")
        add(archive, "metadata.csv", b"file_name,label\n0.png,5\n")
    listing = listing_of(tmp_path / NAME)
    assert [c.class_name for c in to_candidates(listing.table)] == ["7"]
    assert "label files in the archive are not read" in listing.notes[-1].text
