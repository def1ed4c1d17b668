"""The harness notices what it is there to notice; no process is harmed here."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from drorae.data.order import epoch_ids, position
from tests.chaos.__main__ import main
from tests.chaos.faults import fill, forbid_growth, small_disk
from tests.chaos.journal import order_errors, read_groups, steps_redone
from tests.chaos.processes import command_of, descendants, end_all, is_alive, with_variable
from tests.chaos.scenarios import SCENARIOS
from tests.chaos.stage import BATCH, SAMPLES, Journal
from tests.chaos.table import Row, render

SEED, NUM_STEPS = 3, 16


def ids_of(step: int, seed: int = SEED) -> list[int]:
    epoch, inner = position(step, SAMPLES, BATCH)
    return epoch_ids(seed, epoch, (SAMPLES,), BATCH, 1, 0)[inner].tolist()


def write(path: Path, group: str, first: int, last: int, seed: int = SEED) -> None:
    """A group of two ranks that does the steps from `first` to before `last`."""
    lines = []
    for rank in (0, 1):
        who = {"rank": rank, "world_size": 2, "pid": rank, "group": group, "time": 0.0}
        lines.append({**who, "event": "start", "step": first})
        for step in range(first, last):
            half = ids_of(step, seed)[rank * BATCH // 2 : (rank + 1) * BATCH // 2]
            lines.append({**who, "event": "batch", "step": step, "ids": half})
    with path.open("a") as journal:
        journal.writelines(json.dumps(line) + "\n" for line in lines)


def errors_of(path: Path) -> list[str]:
    return order_errors(read_groups(path), NUM_STEPS, SEED)


def test_a_run_with_restarts_counts_every_sample_once(tmp_path):
    path = tmp_path / "journal"
    write(path, "a", 0, 9)
    write(path, "b", 5, 13)
    write(path, "c", 10, NUM_STEPS)
    assert errors_of(path) == []
    assert steps_redone(read_groups(path)) == [4, 3]


def test_another_order_after_a_restart_is_noticed(tmp_path):
    path = tmp_path / "journal"
    write(path, "a", 0, 9)
    write(path, "b", 5, NUM_STEPS, seed=SEED + 1)
    errors = errors_of(path)
    assert any("different ones" in error for error in errors)
    assert "step 5: another batch than that of the seed" in errors


def test_a_step_that_no_group_did_is_noticed(tmp_path):
    path = tmp_path / "journal"
    write(path, "a", 0, 5)
    write(path, "b", 7, NUM_STEPS)
    with pytest.raises(AssertionError, match="step 5"):
        errors_of(path)


def test_a_step_that_one_rank_left_out_is_noticed(tmp_path):
    path = tmp_path / "journal"
    write(path, "a", 0, NUM_STEPS)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [e for e in lines if (e["event"], e["step"], e["rank"]) != ("batch", 15, 1)]
    path.write_text("".join(json.dumps(e) + "\n" for e in kept))
    with pytest.raises(AssertionError, match="step 15"):
        errors_of(path)


def test_the_journal_is_read_as_it_is_written(tmp_path):
    from drorae.training.world import World

    journal = Journal(tmp_path / "journal", World())
    journal.note("start", step=0)
    journal.note("batch", step=0, ids=ids_of(0))
    (group,) = read_groups(tmp_path / "journal")
    assert (group.pids, group.next_step, group.ids[0][0]) == ({0: os.getpid()}, 1, ids_of(0))


def test_a_problem_makes_a_row_fail_and_is_told():
    rows = [Row(scenario="good", equal=True), Row(scenario="bad", problems=["why"])]
    text = render(rows)
    assert [row.ok for row in rows] == [True, False]
    assert "FAILED" in text
    assert text.endswith("bad: why")


def test_every_scenario_is_listed_with_its_meaning(capsys):
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == list(SCENARIOS)
    assert all(len(line) > 20 for line in shown)


@pytest.mark.parametrize(("bad_tries", "code"), [(0, 0), (1, 0), (2, 1)])
def test_a_second_try_decides_and_both_are_shown(bad_tries, code, monkeypatch, capsys):
    tries = []

    def flaky(bench, row, numbers):
        tries.append(numbers.random())
        row.problems += ["late"] * (len(tries) <= bad_tries)

    monkeypatch.setitem(SCENARIOS, "flaky", flaky)
    # The harness handles SIGTERM and sets variables, in its own process.
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert main(["--only", "flaky", "--again"]) == code
    table = capsys.readouterr().out.rpartition("| ---")[2]
    assert table.count("| flaky") == len(tries) == 1 + (bad_tries > 0)
    assert len(set(tries)) == 1  # the same moments


def test_processes_are_found_and_ended():
    sleep = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    code = f"import subprocess, sys; subprocess.run({sleep})"
    environment = {**os.environ, "CHAOS_TEST": "found"}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        while not descendants(parent.pid):
            assert parent.poll() is None
        (child,) = descendants(parent.pid)
        assert "subprocess" in command_of(parent.pid)
        assert with_variable("CHAOS_TEST=found", [parent.pid, os.getpid()]) == [parent.pid]
        os.kill(parent.pid, signal.SIGSTOP)
        assert is_alive(parent.pid)
        end_all([child, parent.pid], grace_s=0.0)
    finally:
        parent.kill()
        parent.wait()
    assert not is_alive(parent.pid)


def test_a_small_disk_is_full_until_it_is_freed(tmp_path):
    with small_disk(tmp_path / "disk") as mounted:
        if not mounted:
            pytest.skip("this user may not mount a file system")
        free = fill(tmp_path / "disk")
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "disk" / "more").write_bytes(bytes(100_000))
        free()
        (tmp_path / "disk" / "again").write_bytes(bytes(100_000))
    assert not (tmp_path / "disk" / "again").exists()


def test_without_a_small_disk_growth_is_forbidden(tmp_path):
    path = tmp_path / "file"
    free = forbid_growth(os.getpid(), 1000)
    try:
        with pytest.raises(OSError, match="File too large"):
            path.write_bytes(bytes(2000))
    finally:
        free()
    path.write_bytes(bytes(2000))
