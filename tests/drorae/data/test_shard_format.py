from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from drorae.data import shard_format
from drorae.data.shard_format import (
    PICTURE_SCHEMA,
    ShardPart,
    index_name,
    parse_index,
    part_name,
    write_index,
    write_latent_shard,
    write_picture_shard,
)
from drorae.store import files

PICTURES = [b"first", b"", b"the third one"]


def picture_rows(pictures: list[bytes], first_id: int = 0) -> pa.RecordBatch:
    rows = [
        {
            "id": first_id + number,
            "key": f"cat/{number}",
            "label": number % 2,
            "image": data,
            "source_sha256": "0" * 64,
            "source_width": 3,
            "source_height": 4,
        }
        for number, data in enumerate(pictures)
    ]
    return pa.RecordBatch.from_pylist(rows, schema=PICTURE_SCHEMA)


def latents(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 2, 3, 3)).astype(np.float16)


def mapped(path: Path) -> pa.RecordBatch:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    assert reader.num_record_batches == 1
    return reader.get_batch(0)


def test_pictures_lie_in_the_file_where_the_index_says(tmp_path: Path):
    parts = [
        write_picture_shard(str(tmp_path), part_name("train", 0), picture_rows(PICTURES)),
        write_picture_shard(str(tmp_path), part_name("train", 1), picture_rows([b"x"], 3)),
    ]
    entry = write_index(str(tmp_path), "train", parts)
    assert entry.name == "train/index.arrow"
    index = parse_index((tmp_path / entry.name).read_bytes())
    assert index.shard_rows == (3, 1)
    assert index.labels.tolist() == [0, 1, 0, 0]
    assert index.shards_of(np.array([0, 2, 3])).tolist() == [0, 0, 1]
    for row, picture in enumerate([*PICTURES, b"x"]):
        content = (tmp_path / part_name("train", int(row == 3))).read_bytes()
        start, size = int(index.starts[row]), int(index.sizes[row])
        assert content[start : start + size] == picture


def test_pyarrow_reads_every_column_of_pictures(tmp_path: Path):
    rows = picture_rows(PICTURES)
    part = write_picture_shard(str(tmp_path), part_name("val", 0), rows)
    assert mapped(tmp_path / part.name).to_pylist() == rows.to_pylist()
    assert part.sha256 == files.sha256_of(str(tmp_path / part.name))
    assert part.size_bytes == (tmp_path / part.name).stat().st_size


def test_a_slice_is_written_as_its_rows_alone(tmp_path: Path):
    whole = picture_rows([b"before", *PICTURES])
    part = write_picture_shard(str(tmp_path), part_name("val", 0), whole.slice(1))
    write_index(str(tmp_path), "val", [part])
    index = parse_index((tmp_path / index_name("val")).read_bytes())
    start, size = int(index.starts[2]), int(index.sizes[2])
    assert (tmp_path / part.name).read_bytes()[start : start + size] == PICTURES[2]


def test_latents_are_rows_of_one_size_at_the_stated_byte(tmp_path: Path):
    columns = {"latent": latents(5), "latent_flip": latents(5, seed=1)}
    labels = np.arange(5)
    part = write_latent_shard(str(tmp_path), part_name("train", 0), columns, labels, 10)
    batch = mapped(tmp_path / part.name)
    assert batch.column("id").to_pylist() == [10, 11, 12, 13, 14]
    assert batch.column("label").to_pylist() == labels.tolist()
    for name, values in columns.items():
        column = batch.column(name)
        assert column.to_pylist() == values.tolist()
        start = part.offsets[name]
        assert start % 8 == 0
        data = np.memmap(tmp_path / part.name, np.float16, "r", start, values.shape)
        np.testing.assert_array_equal(data, values)
    write_index(str(tmp_path), "train", [part])
    index = parse_index((tmp_path / index_name("train")).read_bytes())
    assert index.offsets == (part.offsets,)
    assert len(index.sizes) == len(index.starts) == 0


def test_rows_may_be_filled_while_they_are_written(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(shard_format, "WRITE_BYTES", 50)  # 1.4 rows
    rows, values, asked = np.zeros((5, 2, 3, 3), np.float16), latents(5), []

    def filled(count: int) -> None:
        asked.append(count)
        rows[:count] = values[:count]

    name, labels = part_name("train", 0), np.zeros(5)
    write_latent_shard(str(tmp_path), name, {"latent": rows}, labels, 0, filled)
    assert asked == [2, 3, 5, 5]
    assert mapped(tmp_path / name).column("latent").to_pylist() == values.tolist()


def test_a_writer_that_is_given_up_leaves_no_shard(tmp_path: Path):
    def filled(count: int) -> None:
        raise RuntimeError("not computed")

    with pytest.raises(RuntimeError, match="not computed"):
        write_latent_shard(str(tmp_path), "train/p", {"latent": latents(2)}, np.zeros(2), 0, filled)
    assert not list((tmp_path / "train").iterdir())


def test_equal_rows_give_equal_bytes(tmp_path: Path):
    for root in ("a", "b"):
        part = write_picture_shard(str(tmp_path / root), "train/p", picture_rows(PICTURES))
        write_latent_shard(
            str(tmp_path / root), "train/l", {"latent": latents(3)}, np.zeros(3), first_id=0
        )
        write_index(str(tmp_path / root), "train", [part])
    for name in ("train/p", "train/l", "train/index.arrow"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_part_survives_json(tmp_path: Path):
    part = write_picture_shard(str(tmp_path), part_name("val", 0), picture_rows(PICTURES))
    again = ShardPart.from_json(part.to_json())
    assert again.to_json() == part.to_json()
    assert again.entry == part.entry
    assert again.sizes.tolist() == [len(data) for data in PICTURES]


def test_an_empty_split_has_an_index(tmp_path: Path):
    write_index(str(tmp_path), "val", [])
    index = parse_index((tmp_path / index_name("val")).read_bytes())
    assert index.shard_rows == ()
    assert len(index.labels) == 0


def test_what_does_not_fit_the_format_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="expected PICTURE_SCHEMA"):
        write_picture_shard(str(tmp_path), "x", pa.record_batch({"image": pa.array([b"x"])}))
    for wrong in ({"latent": latents(2).astype(np.float32)}, {"latent": latents(3)}):
        with pytest.raises(ValueError, match="expected float16"):
            write_latent_shard(str(tmp_path), "x", wrong, np.zeros(2), 0)
    with pytest.raises(ValueError, match="no index of shards"):
        parse_index(b"something else")
    write_index(str(tmp_path), "val", [])
    with pytest.raises(IndexError, match="out of range"):
        parse_index((tmp_path / index_name("val")).read_bytes()).shards_of(np.array([0]))
