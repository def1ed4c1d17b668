"""Child processes that never outlive us.

Each child leads its own process group and holds a pipe to its parent as standard input. When the
parent goes, by SIGKILL too, the pipe closes and the child ends its group. This works on every Unix
and does not depend on which thread started the child, as PR_SET_PDEATHSIG would. `python -m
pipelines.children MODULE ARGS...` runs any module so.
"""

import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

LIFELINE_VARIABLE = "DRORAE_LIFELINE"


def spawn(command: Sequence[str], *, log_path: Path, env: Mapping[str, str]) -> subprocess.Popen:
    """Start a child in its own process group, its output appended to a log file.

    Args:
        command: Program and arguments.
        log_path: Log file; its folder is created.
        env: Variables added to ours.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **env, LIFELINE_VARIABLE: "1"},
        )


def stop(process: subprocess.Popen, grace_s: float) -> None:
    """End a child and its group: SIGTERM, `grace_s` seconds, then SIGKILL."""
    for number, timeout_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, None)):
        if process.poll() is None:
            _signal_group(process.pid, number)
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                continue
    # The leader may end before the processes that it started.
    _signal_group(process.pid, signal.SIGKILL)
    if process.stdin:
        process.stdin.close()


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return


def end_with_parent() -> None:
    """Watch the lifeline in a thread and end our own process group when the parent is gone.

    Does nothing when `spawn` did not start this process (a Ray job, a shell).
    """
    if os.environ.pop(LIFELINE_VARIABLE, None) is None:
        return
    threading.Thread(target=_watch, args=(os.getpgrp(),), name="lifeline", daemon=True).start()


def _watch(group: int) -> None:
    while os.read(0, 4096):
        pass
    os.killpg(group, signal.SIGKILL)


def main(argv: Sequence[str]) -> None:
    """Run the module `argv[0]` with the other arguments as a program that ends with its parent."""
    end_with_parent()
    sys.argv = list(argv)
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
