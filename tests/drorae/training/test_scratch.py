"""Folders of living, ended and killed owners."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from drorae.training.scratch import scratch_folder

OWNER = """
import sys, tempfile, time
tempfile.tempdir = sys.argv[1]
from drorae.training.scratch import scratch_folder
with scratch_folder() as path:
    open(path + "/file", "w").close()
    print(path, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def owner(place: Path) -> Iterator[tuple[subprocess.Popen, Path]]:
    command = [sys.executable, "-c", OWNER, str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_a_folder_goes_with_its_block(place):
    with scratch_folder() as path:
        assert os.path.isdir(path)
    assert not list(place.iterdir())


def test_what_a_killed_owner_left_is_deleted_at_the_next_start_and_nothing_else(place, owner):
    process, left = owner
    (place / "other").mkdir()
    with scratch_folder() as path:
        assert left.is_dir()  # its owner lives
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (left / "file").exists()
    with scratch_folder() as path:
        assert sorted(place.iterdir()) == sorted([place / "other", Path(path)])


def test_many_that_start_at_once_keep_their_folders(place):
    def work(number: int) -> bool:
        with scratch_folder() as path:
            file = Path(path) / "file"
            file.write_text(str(number))
            with scratch_folder():
                return file.read_text() == str(number)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(400)))
    assert not list(place.iterdir())
