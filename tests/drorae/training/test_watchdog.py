"""A loop that stands still, one that is only slow, and who is named."""

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from drorae.config import Compute, to_json
from drorae.store import arrivals, files, patience
from drorae.training import watchdog
from drorae.training.watchdog import (
    RankReport,
    Watchdog,
    read_reports,
    report_uri,
    unhurried,
    watched,
)

TIMEOUT_S = 0.3
LONG_S = 1.0


@pytest.fixture
def hangs(monkeypatch):
    """What the watchdog said before it ended the process, which here goes on."""
    monkeypatch.setattr(watchdog, "REPORT_EVERY_S", (0.05, 0.05))
    monkeypatch.setattr(arrivals, "STALLED_S", 0.3)
    said: list[tuple[int, str]] = []
    monkeypatch.setattr(watchdog, "end_process", lambda code: None)
    return said


def guard(folder, hangs, world_size: int = 1) -> Watchdog:
    note = lambda rank, message: hangs.append((rank, message))  # noqa: E731
    return Watchdog(str(folder), 0, world_size, TIMEOUT_S, LONG_S, note)


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

    thread = threading.Thread(target=report, daemon=True)
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
    monkeypatch.setattr(watchdog.patience, "PATIENCE_S", 0.8)
    with guard(tmp_path, hangs):
        list(watched(lambda start: batches([0.01] * 4))(0))
        list(watched(lambda start: batches([0, 0, 0.8]))(0))
        assert not hangs
        list(watched(lambda start: batches([0, 0, 2.5]))(0))
    assert hangs[0][0] == 0


def test_a_read_that_waits_for_an_absent_store_is_no_hang(tmp_path, hangs, monkeypatch):
    def read(pause_s: float) -> Iterator[int]:
        back_s = time.monotonic() + pause_s

        def request() -> int:
            if time.monotonic() < back_s:
                raise TimeoutError
            return 2

        yield from (0, 1, patience.patiently(request))

    monkeypatch.setattr(watchdog.patience, "PATIENCE_S", 1.0)
    with guard(tmp_path, hangs):
        list(watched(lambda start: read(0.9))(0))
    assert not hangs


def test_a_download_that_advances_is_no_hang_and_one_that_stalls_is(tmp_path, hangs):
    def read(arriving_s: float, stalled_s: float) -> Iterator[int]:
        yield from (0, 1)
        with arrivals.awaited():
            end_s = time.monotonic() + arriving_s
            while time.monotonic() < end_s:
                arrivals.note()
                time.sleep(0.02)
            time.sleep(stalled_s)
        yield 2

    with guard(tmp_path, hangs):
        list(watched(lambda start: read(1.5, 0))(0))
        assert not hangs
        list(watched(lambda start: read(0.5, 2.0))(0))
    assert hangs[0][0] == 0


def test_slow_steps_raise_the_limit_and_a_single_slow_one_does_not(tmp_path, hangs):
    with guard(tmp_path, hangs):
        list(watched(lambda start: batches([0, 0, 0, 0, 0, 0, 0.25, 0, 0]))(0))
        assert not hangs
        list(watched(lambda start: batches([0, 0, 0, 1.0]))(0))
    assert len(hangs) >= 1
    hangs.clear()
    with guard(tmp_path, hangs):
        list(watched(lambda start: batches([0.1] * 8 + [1.2]))(0))
    assert not hangs


@pytest.mark.parametrize(("pause_s", "found"), [(0.8, False), (2.0, True)])
def test_what_is_announced_may_take_longer_but_not_for_ever(tmp_path, hangs, pause_s, found):
    with guard(tmp_path, hangs):
        for number in watched(lambda start: batches([0] * 4))(0):
            if number == 2:
                with unhurried("evaluation"):
                    time.sleep(pause_s)
    assert bool(hangs) is found


def test_a_rank_waits_for_another_that_is_at_work_and_for_its_step_after_that(
    tmp_path, hangs, monkeypatch
):
    numbers = itertools.count()

    def reports(busy: str) -> dict[int, RankReport]:
        where = RankReport(rank=1, host="h", pid=7, batches=2, number=next(numbers), where="a.py:1")
        return {1: replace(where, busy=busy)}

    waiting = guard(tmp_path, hangs, world_size=2)
    waiting._batches, waiting._last_s = 2, time.monotonic() - 10
    monkeypatch.setattr(watchdog, "read_reports", lambda folder, size: reports("evaluation"))
    assert waiting._explain() is None
    assert waiting._late_s() <= 0
    monkeypatch.setattr(watchdog, "read_reports", lambda folder, size: reports(""))
    assert waiting._explain() is None
    time.sleep(2 * TIMEOUT_S)
    assert waiting._explain() is not None


def test_by_default_a_hang_is_found_within_two_minutes(tmp_path):
    compute = Compute()
    limits_s = compute.hang_timeout_s, compute.collective_timeout_s
    every_s = Watchdog(str(tmp_path), 0, 1, *limits_s, lambda rank, message: None).every_s
    assert compute.hang_timeout_s + 2.2 * every_s < 115


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
        f"with watchdog.Watchdog({str(tmp_path)!r}, 0, 1, 0.3, 1.0, note):\n"
        "    for _ in watchdog.watched(lambda start: iter([1, 2, 3]))(0):\n"
        "        time.sleep(0 if _ == 1 else 60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=50, check=False
    )
    assert done.returncode == watchdog.EXIT_CODE
