"""A loop that stands still, one that is only slow, and who is named."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from drorae.config import to_json
from drorae.store import files
from drorae.training import watchdog
from drorae.training.watchdog import RankReport, Watchdog, read_reports, report_uri, watched

TIMEOUT_S = 0.3


@pytest.fixture
def hangs(monkeypatch):
    """What the watchdog said before it ended the process, which here goes on."""
    monkeypatch.setattr(watchdog, "REPORT_EVERY_S", (0.05, 0.05))
    said: list[tuple[int, str]] = []
    monkeypatch.setattr(watchdog, "end_process", lambda code: None)
    return said


def guard(folder, hangs, world_size: int = 1) -> Watchdog:
    note = lambda rank, message: hangs.append((rank, message))  # noqa: E731
    return Watchdog(str(folder), 0, world_size, TIMEOUT_S, note)


def batches(pauses_s: list[float]) -> Iterator[int]:
    for number, pause_s in enumerate(pauses_s):
        time.sleep(pause_s)
        yield number


def other(folder, **fields) -> None:
    report = RankReport(rank=1, host="h", pid=7, batches=0, number=1, where="a.py:1 (f)")
    fields = to_json(report) | fields
    files.write_json(report_uri(str(folder), 1), fields)


def test_a_read_that_does_not_return_is_named(tmp_path, hangs):
    with guard(tmp_path, hangs):
        list(watched(lambda start: batches([0, 0, 1.5]))(0))
    (rank, message), *rest = hangs
    assert rank == 0
    assert not rest
    assert "after 2 batches" in message
    assert "compute.hang_timeout_s" in message


def test_a_step_that_does_not_return_is_named_with_its_place(tmp_path, hangs):
    with guard(tmp_path, hangs):
        for number in watched(lambda start: batches([0, 0, 0]))(0):
            time.sleep(1.5 if number == 1 else 0)
    assert "stands still in" in hangs[0][1]


def test_the_first_step_and_what_follows_the_last_may_take_long(tmp_path, hangs):
    with guard(tmp_path, hangs):
        for number in watched(lambda start: batches([0, 0, 0.1, 0.1]))(0):
            time.sleep(0.8 if number == 0 else 0)
        time.sleep(0.8)
    assert not hangs


def test_a_loop_that_advances_is_left_alone(tmp_path, hangs):
    with guard(tmp_path, hangs):
        list(watched(lambda start: batches([0.2] * 6))(0))
    assert not hangs


def test_a_silent_rank_is_named_by_the_one_that_waits_for_it(tmp_path, hangs):
    other(tmp_path, batches=2)
    with guard(tmp_path, hangs, world_size=2):
        list(watched(lambda start: batches([0, 0, 1.5]))(0))
    assert hangs[0][0] == 1
    assert "rank 1 (host h, process 7) does not answer after 2 batches" in hangs[0][1]


def test_of_two_live_ranks_the_one_with_fewer_batches_is_named(tmp_path, hangs):
    stop = threading.Event()

    def report() -> None:
        number = 1
        while not stop.wait(0.02):
            number += 1
            other(tmp_path, batches=1, number=number)

    thread = threading.Thread(target=report)
    thread.start()
    with guard(tmp_path, hangs, world_size=2):
        list(watched(lambda start: batches([0, 0, 0, 1.5]))(0))
    stop.set()
    thread.join()
    assert hangs[0][0] == 1
    assert "rank 1 (host h, process 7) stands still in a.py:1 (f)" in hangs[0][1]


def test_a_store_that_is_away_does_not_disturb_the_loop(tmp_path, hangs, monkeypatch):
    def away(*arguments):
        raise RuntimeError("the store is away")

    monkeypatch.setattr(watchdog.files, "write_json", away)
    monkeypatch.setattr(watchdog.files, "read_json", away)
    with guard(tmp_path, hangs):
        list(watched(lambda start: batches([0.1] * 4))(0))
        assert not hangs
        list(watched(lambda start: batches([0, 0, 1.5]))(0))
    assert hangs[0][0] == 0


def test_batches_without_a_watchdog_stay_as_they_are():
    make = lambda start: iter([1, 2])  # noqa: E731
    assert watched(make) is make


def test_reports_tell_where_the_loop_is(tmp_path, hangs):
    with guard(tmp_path, hangs):
        for _ in watched(lambda start: batches([0, 0]))(0):
            time.sleep(0.15)
        report = read_reports(str(tmp_path), 2)[0]
    assert report.batches == 2
    assert report.where


def test_the_process_really_ends(tmp_path):
    code = (
        "import sys, time\n"
        "from drorae.training import watchdog\n"
        "watchdog.REPORT_EVERY_S = (0.05, 0.05)\n"
        "note = lambda rank, message: print(rank, message)\n"
        f"with watchdog.Watchdog({str(tmp_path)!r}, 0, 1, 0.3, note):\n"
        "    for _ in watchdog.watched(lambda start: iter([1, 2, 3]))(0):\n"
        "        time.sleep(0 if _ == 1 else 60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=50, check=False
    )
    assert done.returncode == watchdog.EXIT_CODE
