import json
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reader_fakes import check_damage, contents_of, texts_of

from drorae.data.readers.candidates import Candidate, Listing, ReadRule, to_candidates
from drorae.data.readers.parquet import list_parquet
from drorae.data.readers.source import list_source, read_records

NAME = "set.parquet"


def write(path: Path, columns: Any, features: Any = None, **options: Any) -> Path:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    if features is not None:
        text = features if isinstance(features, str) else json.dumps(features)
        table = table.replace_schema_metadata({"huggingface": text})
    pq.write_table(table, path, **options)
    return path


def class_label(*names: str) -> dict[str, Any]:
    return {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}


def listing_of(path: Path, **rule: object) -> Listing:
    return list_parquet(str(path), path.name, ReadRule(**rule))


def labels_of(listing: Listing) -> list[str]:
    return [c.class_name for c in to_candidates(listing.table)]


def reasons(listing: Listing) -> dict[str, str]:
    return {key.removeprefix(f"{NAME}/"): reason for key, reason in listing.rejects}


def images(count: int) -> list[bytes]:
    return [random.Random(n).randbytes(500) for n in range(count)]


@pytest.mark.parametrize("as_struct", [True, False])
def test_numbers_are_the_names_that_the_file_lists(tmp_path: Path, as_struct: bool):
    column = [{"bytes": data, "path": None} if as_struct else data for data in images(5)]
    table = {"image": column, "label": [0, 1, -1, None, 2]}
    listing = listing_of(write(tmp_path / NAME, table, class_label("cat", "dog"), row_group_size=2))
    assert listing.class_names == ("cat", "dog")
    assert labels_of(listing) == ["cat", "dog", "", ""]
    assert reasons(listing) == {
        "00000004": "has no label: label 2 is none of the 2 classes of the file"
    }
    assert list(contents_of(listing).values()) == images(4)
    assert listing.has_stated_labels


def test_each_file_counts_its_own_names(tmp_path: Path):
    table = {"image": images(2), "label": [0, 1]}
    first = listing_of(write(tmp_path / "a.parquet", table, class_label("cat", "dog")))
    second = listing_of(write(tmp_path / "b.parquet", table, class_label("bird", "cat")))
    third = listing_of(write(tmp_path / "c.parquet", table))
    assert [labels_of(found) for found in (first, second, third)] == [
        ["cat", "dog"],
        ["bird", "cat"],
        ["0", "1"],
    ]
    assert third.class_names == ()


def test_numbers_without_names_count_the_names_that_all_other_files_list(tmp_path: Path):
    table = {"image": images(3), "label": [1, 0, None]}
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet", table, class_label("dog", "cat"))
    write(tmp_path / "c.parquet", table)
    listing = list_source(str(tmp_path))
    assert labels_of(listing) == ["cat", "dog"] * 3
    assert listing.class_names == ("dog", "cat")
    assert "1 containers, such as 'c.parquet', list no names of classes" in texts_of(listing)
    write(tmp_path / "d.parquet", {"image": images(1), "label": [2]})
    with pytest.raises(ValueError, match="labels up to 2 but no names of classes"):
        list_source(str(tmp_path))
    write(tmp_path / "d.parquet", table, class_label("cat", "dog"))
    with pytest.raises(ValueError, match="the others list 2 different sets"):
        list_source(str(tmp_path))


def test_two_classes_of_one_name_stay_apart(tmp_path: Path):
    table = {"image": images(3), "label": [0, 1, 2]}
    path = write(tmp_path / NAME, table, class_label("crane", "dog", "crane"))
    assert labels_of(listing_of(path)) == ["crane", "dog", "crane (2)"]


@pytest.mark.parametrize(
    "metadata",
    [
        {"info": None},
        {"info": {"features": None}},
        {"info": {"features": {"label": None}}},
        {"info": {"features": {"label": {"names": None}}}},
        {"info": {"features": {"label": {"names": [1, None]}}}},
        {"info": {"features": [1]}},
        [],
        "{broken",
        "\u00ff",
        "[" * 100_000,
    ],
)
def test_metadata_without_names_leaves_numbers(tmp_path: Path, metadata: Any):
    path = write(tmp_path / NAME, {"image": images(2), "label": [3, 4]}, metadata)
    listing = listing_of(path)
    assert labels_of(listing) == ["3", "4"]
    assert listing.class_names == ()


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        (pa.array([np.float16(10), np.float16(2), None], pa.float16()), ["10", "2", ""]),
        (pa.array([2.0, float("nan"), 11.0]), ["2", "", "11"]),
        (pa.array([Decimal("2.00"), None, Decimal("3.00")]), ["2", "", "3"]),
        (pa.array(["cat", None, " dog\n"]), ["cat", "", "dog"]),
        (pa.array([b"cat", b"\xff", b""]), ["cat", "\\xff", ""]),
        (pa.array(["cat", "dog", None]).dictionary_encode(), ["cat", "dog", ""]),
        (pa.array([255, 0, 7], pa.uint8()), ["255", "0", "7"]),
        (pa.array([None, None, None], pa.null()), ["", "", ""]),
    ],
)
def test_labels_of_any_type_become_text(tmp_path: Path, column: pa.Array, texts: list[str]):
    path = write(tmp_path / NAME, {"image": images(3), "label": column})
    assert labels_of(listing_of(path)) == texts


@pytest.mark.parametrize("bad", [[1, 2], 0.5, True, {"id": 1}])
def test_a_label_that_is_no_single_class_is_a_reject(tmp_path: Path, bad: Any):
    path = write(tmp_path / NAME, {"image": images(2), "label": [bad, None]})
    listing = listing_of(path)
    assert labels_of(listing) == [""]
    assert reasons(listing)["00000000"].startswith("has no label: label")


def test_a_missing_label_column_is_an_error_that_names_the_others(tmp_path: Path):
    path = write(tmp_path / NAME, {"image": images(1), "fine": [1], "coarse": ["a"], "box": [[1]]})
    with pytest.raises(ValueError, match=r"no column 'label'.*label_column to one of \['fine', 'c"):
        listing_of(path)
    assert labels_of(listing_of(path, label_column="fine")) == ["1"]
    unlabelled = listing_of(path, label_column=None)
    assert labels_of(unlabelled) == [""]
    assert not unlabelled.has_stated_labels


def test_a_table_of_images_alone_has_no_labels(tmp_path: Path):
    listing = listing_of(write(tmp_path / NAME, {"image": images(2), "boxes": [[1], [2]]}))
    assert labels_of(listing) == ["", ""]
    assert not listing.has_stated_labels
    assert "shard.label_column names it" in texts_of(listing)


def test_a_missing_image_column_is_an_error_that_names_the_others(tmp_path: Path):
    path = write(tmp_path / NAME, {"photo": [b"x"]})
    with pytest.raises(ValueError, match=r"image_column to one of \['photo'\]"):
        listing_of(path)


def test_two_columns_of_one_name_are_an_error(tmp_path: Path):
    table = pa.table(
        [pa.array(images(1)), pa.array([1]), pa.array([2])], ["image", "label", "label"]
    )
    with pytest.raises(ValueError, match="several columns 'label'"):
        listing_of(write(tmp_path / NAME, table))


def test_columns_may_lie_in_structs_or_have_dots_in_their_names(tmp_path: Path):
    samples = [{"image": data, "about": {"label": 5}} for data in images(2)]
    table = {"sample": samples, "a.b": [1, 2]}
    path = write(tmp_path / NAME, table)
    listing = listing_of(path, image_column="sample.image", label_column="sample.about.label")
    assert labels_of(listing) == ["5", "5"]
    assert list(contents_of(listing).values()) == images(2)
    assert labels_of(listing_of(path, image_column="sample.image", label_column="a.b")) == [
        "1",
        "2",
    ]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.large_binary(), images(3)),
        (pa.list_(pa.uint8()), [list(data) for data in images(3)]),
        (pa.binary(500), images(3)),
        (pa.dictionary(pa.int32(), pa.binary()), images(3)),
    ],
)
def test_bytes_are_read_from_any_type_that_holds_them(tmp_path: Path, kind, values):
    path = write(tmp_path / NAME, {"image": pa.array(values, kind), "label": [1, 2, 3]})
    assert list(contents_of(listing_of(path)).values()) == images(3)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ({"bytes": None, "path": "a.png"}, "image is a path, not bytes"),
        ({"bytes": None, "path": None}, "no image bytes but NoneType"),
        ("a.png", "no image bytes but str"),
        (None, "no image bytes but NoneType"),
        ([1.5], "no image bytes but list"),
    ],
)
def test_rows_without_bytes_are_errors(tmp_path: Path, image: Any, reason: str):
    listing = listing_of(write(tmp_path / NAME, {"image": [image], "label": [1]}))
    assert reason in contents_of(listing)[f"{NAME}/00000000"]


def damage_chunk(path: Path, group: int, column: int) -> None:
    chunk = pq.ParquetFile(path).metadata.row_group(group).column(column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 8] = b"\xff" * 8
    path.write_bytes(bytes(data))


def test_a_damaged_row_group_rejects_its_rows_only(tmp_path: Path):
    table = {"image": images(6), "label": [0, 1, 2, 3, 4, 5]}
    path = write(tmp_path / NAME, table, row_group_size=2)
    damage_chunk(path, 1, 0)
    found = contents_of(listing_of(path))
    good = [value for value in found.values() if isinstance(value, bytes)]
    assert good == [*images(2), *images(6)[4:]]
    assert all(
        "row group 1 of" in found[f"{NAME}/{row:08d}"] and NAME in found[f"{NAME}/{row:08d}"]
        for row in (2, 3)
    )


def test_damaged_labels_reject_the_rows_of_their_group_only(tmp_path: Path):
    table = {"image": images(6), "label": [0, 1, 2, 3, 4, 5]}
    path = write(tmp_path / NAME, table, row_group_size=2)
    damage_chunk(path, 1, 1)
    listing = listing_of(path)
    assert labels_of(listing) == ["0", "1", "4", "5"]
    assert list(contents_of(listing).values()) == [*images(2), *images(6)[4:]]
    assert set(reasons(listing)) == {"00000002", "00000003"}
    assert all(
        "row group 1 of" in text and "labels that cannot be read" in text
        for text in reasons(listing).values()
    )


def test_checksums_of_pages_are_verified(tmp_path: Path):
    table = {"image": images(1), "label": [0]}
    path = write(
        tmp_path / NAME, table, write_page_checksum=True, use_dictionary=False, compression=None
    )
    data = path.read_bytes()
    path.write_bytes(data.replace(images(1)[0][100:110], b"0123456789"))
    assert "cannot be read" in contents_of(listing_of(path))[f"{NAME}/00000000"]


def test_some_rows_of_a_file_are_read_in_order(tmp_path: Path):
    path = write(tmp_path / NAME, {"image": images(200), "label": [1] * 200}, row_group_size=90)
    rows = to_candidates(listing_of(path).table)
    wanted = [rows[number] for number in (3, 70, 89, 90, 199)]
    records = list(read_records(wanted))
    assert [record.candidate for record in records] == wanted
    assert [record.data for record in records] == [images(200)[row.index] for row in wanted]


def test_files_that_are_damaged_or_gone_are_rejects(tmp_path: Path):
    path = tmp_path / NAME
    for content in (b"", b"PAR1 no", b"PAR1" + b"\xff" * 40 + b"PAR1"):
        path.write_bytes(content)
        assert "Parquet file is damaged" in reasons(listing_of(path))[NAME]
    path.unlink()
    assert "No such file" in reasons(listing_of(path))[NAME]
    gone = Candidate("k", "c", "", "parquet", str(path), member="image")
    assert "No such file" in next(iter(read_records([gone]))).error


def test_a_file_without_rows_is_an_empty_listing(tmp_path: Path):
    table = {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}
    listing = listing_of(write(tmp_path / NAME, table))
    assert not len(listing)
    assert not listing.rejects


@pytest.mark.parametrize("seed", range(6))
def test_random_tables_give_exactly_what_was_put_in(tmp_path: Path, seed: int):
    draw = random.Random(seed)
    count = draw.randint(1, 300)
    content = [draw.randbytes(draw.choice((0, 1, 300, 5000))) for _ in range(count)]
    labels = [draw.choice([None, -1, 0, 1, 2, 10]) for _ in range(count)]
    as_struct = draw.random() < 0.5
    path = write(
        tmp_path / NAME,
        {
            "label": labels,
            "image": [{"bytes": data} if as_struct else data for data in content],
            "caption": ["x"] * count,
        },
        row_group_size=draw.choice((1, 7, 64, 100, 1000)),
        compression=draw.choice(("none", "snappy", "zstd")),
        data_page_version=draw.choice(("1.0", "2.0")),
        use_dictionary=draw.random() < 0.5,
    )
    listing = listing_of(path)
    assert list(contents_of(listing).values()) == content
    assert labels_of(listing) == ["" if label in (None, -1) else str(label) for label in labels]
    np.testing.assert_array_equal(listing.table["index"], np.arange(count))
    assert not listing.rejects


def test_any_damage_gives_rejects_or_good_rows(tmp_path: Path):
    table = {"image": [data[:90] for data in images(6)], "label": [0, 1, 0, 1, 0, 1]}
    write(
        tmp_path / NAME,
        table,
        class_label("cat", "dog"),
        row_group_size=2,
        write_page_checksum=True,
        compression=None,
    )
    check_damage(list_parquet, tmp_path / NAME, (tmp_path / NAME).read_bytes(), {})
