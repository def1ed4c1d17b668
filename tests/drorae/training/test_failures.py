"""Who is named when a group of workers is lost."""

import errno
import threading

import pytest
from torch import distributed as dist

from drorae.store import files
from drorae.training import failures
from drorae.training.failures import (
    describe,
    first_failure,
    record_error,
    record_hang,
    start_group,
)
from drorae.training.watchdog import RankReport

CLOSED = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:1")


@pytest.fixture
def ranks_uri(tmp_path, monkeypatch):
    monkeypatch.setattr(failures, "LOSS_GRACE_S", 0.2)
    return str(tmp_path / "ranks")


def group(ranks_uri, name="g1", world_size=2) -> str:
    for rank in range(world_size):
        folder_uri = start_group(ranks_uri, name, rank, world_size)
    return folder_uri


def report(folder_uri, rank, number) -> None:
    record = RankReport(rank=rank, host="node", pid=40 + rank, batches=1, number=number, where="x")
    files.write_json(f"{folder_uri}/rank-{rank}.json", failures.to_json(record))


def told(ranks_uri, vanished=(), error=None) -> Exception:
    failure, reports = first_failure(ranks_uri)
    return describe("fusion", failure, reports, vanished, error or Exception("Ray's words"))


def test_the_first_error_of_the_group_is_told(ranks_uri):
    folder_uri = group(ranks_uri)
    record_error(folder_uri, 1, KeyError("the cause"))
    record_error(folder_uri, 0, KeyError("later"))
    assert str(told(ranks_uri)) == "fusion, rank 1: 'the cause'"


def test_a_cause_goes_before_the_broken_connections_that_follow_at_once(ranks_uri):
    folder_uri = group(ranks_uri)
    other = threading.Thread(target=record_error, args=(folder_uri, 0, CLOSED))
    other.start()
    record_error(folder_uri, 1, RuntimeError("no space left for /x"))
    other.join()
    assert str(told(ranks_uri, vanished=[1])) == "fusion, rank 1: no space left for /x"


def test_a_users_mistake_keeps_its_class_and_words(ranks_uri):
    record_error(group(ranks_uri), 0, ValueError("batch_images=7 does not divide"))
    error = told(ranks_uri)
    assert type(error) is ValueError
    assert str(error) == "batch_images=7 does not divide"


def test_an_error_of_an_earlier_group_is_not_told_again(ranks_uri):
    record_error(group(ranks_uri, "g1"), 1, KeyError("old"))
    record_error(group(ranks_uri, "g2"), 0, KeyError("new"))
    assert "new" in str(told(ranks_uri))
    group(ranks_uri, "g3")
    assert "old" not in str(told(ranks_uri))


@pytest.mark.parametrize("error", [CLOSED, dist.DistBackendError("NCCL error: remote process")])
def test_a_killed_rank_is_named_by_what_ray_lost(ranks_uri, error):
    folder_uri = group(ranks_uri)
    report(folder_uri, 1, number=3)
    record_error(folder_uri, 0, error)
    text = str(told(ranks_uri, vanished=[1]))
    assert text.startswith("fusion: rank 1 (host node, process 41) vanished without an exception")


def test_a_lost_machine_is_named_by_its_silence_when_ray_has_not_noticed_it(ranks_uri):
    folder_uri = group(ranks_uri, world_size=3)
    for rank, number in ((0, 9), (1, 9), (2, 4)):
        report(folder_uri, rank, number)
    record_error(folder_uri, 0, CLOSED)
    assert "rank 2 (host node, process 42) vanished" in str(told(ranks_uri))


def test_a_hang_is_told_in_the_words_of_the_watchdog(ranks_uri):
    folder_uri = group(ranks_uri)
    record_hang(folder_uri, 1, "no training step was finished")
    record_error(folder_uri, 0, CLOSED)
    assert str(told(ranks_uri, vanished=[0])) == "fusion, rank 1: no training step was finished"


def test_the_number_of_a_system_error_is_kept(ranks_uri):
    def save() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("no space left for /x") from error

    with pytest.raises(RuntimeError) as caught:
        save()
    record_error(group(ranks_uri), 0, caught.value)
    failure, _ = first_failure(ranks_uri)
    assert failure is not None
    assert failure.errno == errno.ENOSPC


def test_an_error_that_cannot_be_recorded_stays_the_error(ranks_uri, monkeypatch, caplog):
    folder_uri = group(ranks_uri)

    def full(*arguments):
        raise RuntimeError("no space left")

    monkeypatch.setattr(failures.files, "create_exclusive", full)
    record_error(folder_uri, 0, KeyError("the cause"))
    assert "was not recorded" in caplog.text


def test_without_any_account_ray_is_quoted(ranks_uri):
    assert "Ray's words" in str(told(ranks_uri))
