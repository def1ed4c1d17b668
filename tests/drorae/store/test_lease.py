import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from drorae.store import files
from drorae.store import lease as lease_module
from drorae.store.lease import acquire, read_owner
from drorae.store.lease_owner import decode_owner, encode_owner, is_dead, new_owner


@pytest.fixture
def uri(tmp_path):
    return str(tmp_path / "leases" / "fusion-k.json")


def elsewhere(name="other", ttl_s=0.5):
    """A holder on another machine: only silence tells that it is gone."""
    return replace(new_owner(name, ttl_s), machine="another boot", host="far")


def test_free_lease_is_taken_and_given_back(uri):
    assert read_owner(uri) is None
    with acquire(uri, "me") as lease:
        lease.check()
        assert read_owner(uri).pid == os.getpid()
        assert "me (host" in str(read_owner(uri))
    assert read_owner(uri) is None


def test_held_lease_makes_others_wait_and_tells_them_once(uri):
    told = []
    with acquire(uri, "first", ttl_s=0.3):
        deadline_s = time.monotonic() + 1
        until = lambda: time.monotonic() > deadline_s  # noqa: E731
        assert acquire(uri, "second", until=until, on_wait=told.append, poll_s=0.05) is None
    assert [owner.name for owner in told] == ["first"]


def test_waiting_is_told_again_after_a_while(uri, monkeypatch):
    monkeypatch.setattr(lease_module, "REPEAT_WAIT_NOTICE_S", 0.1)
    told = []
    with acquire(uri, "first", ttl_s=5):
        deadline_s = time.monotonic() + 0.5
        until = lambda: time.monotonic() > deadline_s  # noqa: E731
        acquire(uri, "second", until=until, on_wait=told.append, poll_s=0.05)
    assert len(told) >= 2


def test_silent_holder_is_overtaken_after_its_time_to_live(uri, caplog):
    files.write_bytes(uri, encode_owner(elsewhere()))
    started_s = time.monotonic()
    with acquire(uri, "me", poll_s=0.05):
        assert 0.5 < time.monotonic() - started_s < 2
    assert "taking it over" in caplog.text


def test_unreadable_lease_is_overtaken_too(uri, monkeypatch):
    monkeypatch.setattr("drorae.store.lease_owner.DEFAULT_TTL_S", 0.2)
    files.write_bytes(uri, b"{half")
    assert decode_owner(b"{half").name == "an unreadable lease"
    with acquire(uri, "me", poll_s=0.05):
        assert read_owner(uri).name == "me"


def test_dead_process_on_this_machine_is_overtaken_at_once(uri):
    code = (
        "import os, sys; from drorae.store.lease import acquire;"
        "acquire(sys.argv[1], 'killed'); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, uri], check=False)
    assert read_owner(uri).name == "killed"
    started_s = time.monotonic()
    with acquire(uri, "me"):
        assert time.monotonic() - started_s < 1


def test_life_of_a_holder_is_judged_only_on_its_own_machine():
    mine = new_owner("me", 30)
    assert not is_dead(mine)
    assert is_dead(replace(mine, process_started="1"))  # the number was given to another process
    assert is_dead(replace(mine, pid=2**22 + 1))
    assert not is_dead(replace(mine, pid=2**22 + 1, machine="another boot"))
    assert not is_dead(replace(mine, pid=2**22 + 1, machine=""))


def test_of_many_waiters_one_takes_over(uri):
    files.write_bytes(uri, encode_owner(elsewhere()))
    taken = []

    def wait():
        deadline_s = time.monotonic() + 2
        until = lambda: time.monotonic() > deadline_s  # noqa: E731
        lease = acquire(uri, threading.current_thread().name, 30, until=until, poll_s=0.05)
        if lease:
            taken.append(lease)

    threads = [threading.Thread(target=wait) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    taken[0].renew()
    taken[0].release()


def test_overtaken_holder_notices_and_leaves_the_file_alone(uri):
    with acquire(uri, "slow", ttl_s=30) as slow:
        files.write_bytes(uri, encode_owner(elsewhere("faster", 30)))
        with pytest.raises(RuntimeError, match=r"is lost: .*faster.* run the stage again"):
            slow.renew()
        with pytest.raises(RuntimeError, match="is lost"):
            slow.check()
    assert read_owner(uri).name == "faster"


def test_heartbeat_notices_the_loss_by_itself(uri):
    with acquire(uri, "slow", ttl_s=0.3) as slow:
        files.delete(uri)
        time.sleep(0.5)
        with pytest.raises(RuntimeError, match="nobody"):
            slow.check()


def test_holder_gives_up_when_the_store_is_away_for_too_long(uri, monkeypatch, caplog):
    def unreachable(*arguments):
        raise RuntimeError("the store is away")

    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(lease_module.patience, "PATIENCE_S", 0.2)
    with acquire(uri, "cut off", ttl_s=0.3) as lease, monkeypatch.context() as patched:
        patched.setattr(lease_module.versioned, "write_if_version", unreachable)
        time.sleep(0.8)
        with pytest.raises(RuntimeError, match="could not be renewed"):
            lease.check()


def test_short_outage_is_survived(uri, monkeypatch):
    def unreachable(*arguments):
        raise RuntimeError("the store is away")

    with acquire(uri, "patient", ttl_s=1.5) as lease:
        with monkeypatch.context() as patched:
            patched.setattr(lease_module.versioned, "write_if_version", unreachable)
            time.sleep(0.7)
        time.sleep(0.6)
        lease.renew()


def test_outage_longer_than_the_time_to_live_is_survived(uri, monkeypatch):
    def unreachable(*arguments):
        raise RuntimeError("the store is away")

    with acquire(uri, "patient", ttl_s=0.3) as lease:
        with monkeypatch.context() as patched:
            patched.setattr(lease_module.versioned, "write_if_version", unreachable)
            time.sleep(0.8)
        lease.renew()


def test_failed_release_is_only_a_warning(uri, monkeypatch, caplog):
    def unreachable(*arguments):
        raise RuntimeError("the store is away")

    monkeypatch.setattr(lease_module.versioned, "delete_if_version", unreachable)
    with acquire(uri, "me"):
        pass
    assert "runs out by itself" in caplog.text


def test_time_to_live_must_be_positive(uri):
    with pytest.raises(ValueError, match="expected a positive number"):
        acquire(uri, "me", ttl_s=0)
