"""Sources as people have them, through the stage `shard`: rows, labels, pixels and rejects."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import source_fakes as fakes
from data_fakes import job, shard_output
from known_archives import ARCHIVES
from known_sources import FOLDERS, Wanted

from drorae.data.decoding import decode_png

CASES = FOLDERS | ARCHIVES


def check(wanted: Wanted, output) -> None:
    counts = output.read_json("counts.json")
    lines = output.local("rejects.jsonl").read_text().splitlines()
    rejects = {json.loads(line)["key"]: json.loads(line)["reason"] for line in lines}
    found = {split: rows_of(output, split) for split in ("train", "val")}
    labels = {key: row["label"] for rows in found.values() for key, row in rows.items()}
    assert tuple(counts["class_names"]) == wanted.class_names
    expected = wanted.train | wanted.val
    assert labels == {
        key: -1 if name is None else wanted.class_names.index(name)
        for key, (name, _) in expected.items()
    }
    assert set(found["val"]) == set(wanted.val)
    assert set(rejects) == set(wanted.rejects)
    assert counts["rejected"] == len(lines) == len(wanted.rejects)
    for key, reason in wanted.rejects.items():
        assert reason in rejects[key]
    for key, row in {**found["train"], **found["val"]}.items():
        pixels = expected[key][1]
        pixels = fakes.shades(pixels) if isinstance(pixels, int) else pixels
        np.testing.assert_array_equal(decode_png(row["image"]), pixels)


def rows_of(output, split: str) -> dict[str, dict]:
    names = output.names(f"{split}/part-", ".arrow")
    tables = [pa.ipc.open_file(pa.memory_map(str(output.local(n)))).read_all() for n in names]
    return {row["key"]: row for table in tables for row in table.to_pylist()}


@pytest.mark.parametrize("name", CASES)
def test_known_source(name: str, tmp_path: Path):
    root = tmp_path / "source"
    root.mkdir()
    wanted = CASES[name](root)
    settings = {"resolution_px": fakes.SIDE_PX, "val_fraction": 0.0, **wanted.settings}
    shard = job(root / wanted.source, **settings)
    if wanted.error:
        with pytest.raises(ValueError, match=wanted.error):
            shard_output(tmp_path, shard)
        return
    check(wanted, shard_output(tmp_path, shard))
