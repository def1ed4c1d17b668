"""The first sources of `python -m tests.fuzz`, in this process."""

from pathlib import Path

import pytest

from tests.fuzz.readers import READERS, iterate

ITERATIONS = {"image": 60, "labels": 60, "names": 12}
"""Sources of each reader; of the others 25."""


@pytest.mark.parametrize("reader", READERS)
def test_good_sources_come_out_whole_and_damaged_ones_as_rejects(reader: str, tmp_path: Path):
    for iteration in range(ITERATIONS.get(reader, 25)):
        folder = tmp_path / str(iteration)
        folder.mkdir()
        try:
            iterate(reader, seed=1, iteration=iteration, folder=folder)
        except Exception as error:
            again = f"python -m tests.fuzz --reader {reader} --seed 1 --first {iteration}"
            raise AssertionError(f"{again}: {error}") from error
