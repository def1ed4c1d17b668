import os
import signal
import threading

import pytest

from pipelines import run_command


def test_a_second_signal_ends_the_process_unless_it_follows_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    stop = threading.Event()
    with run_command._stop_on_signals(stop):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set()
        assert exits == []
        monkeypatch.setattr(run_command, "SAME_SIGNAL_S", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
    assert exits == [128 + signal.SIGTERM]
