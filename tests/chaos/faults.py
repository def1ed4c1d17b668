"""What is done to a run: signals to its processes, a full disk, an S3 server that goes away."""

import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.chaos.cluster import NodeCluster, raylet_pids
from tests.chaos.journal import wait_until
from tests.chaos.processes import all_pids, descendants, is_alive, with_command
from tests.chaos.product import Run

START_TIMEOUT_S = 180.0
FOUND_TIMEOUT_S = 120.0
BALLAST_BYTES = 1 << 20
DISK_BYTES = 4 << 20


class Moment:
    """A random moment of a run: within a step that is drawn, not at its start.

    Args:
        draw: Source of the draws.
        first_step: Earliest step.
        last_step: Latest step.
    """

    def __init__(self, draw: random.Random, first_step: int = 6, last_step: int = 28) -> None:
        self.step = draw.randint(first_step, last_step)
        self._wait_s = draw.uniform(0.0, 0.2)

    def wait(self, run: Run, earlier_groups: int = 0) -> None:
        """Return at the moment, in a group after so many others."""

        def reached() -> bool:
            if not run.is_running():
                raise RuntimeError(f"the run ended before step {self.step}: {run.errors}")
            groups = run.groups()[earlier_groups:]
            return bool(groups) and groups[-1].next_step > self.step

        wait_until(f"step {self.step}", reached, START_TIMEOUT_S)
        time.sleep(self._wait_s)

    def __str__(self) -> str:
        return f"in step {self.step}"


def kill_rank(run: Run, rank: int) -> str:
    """SIGKILL of a worker."""
    os.kill(run.groups()[-1].pids[rank], signal.SIGKILL)
    return f"SIGKILL of rank {rank}"


def stop_rank(run: Run, rank: int) -> str:
    """SIGSTOP of a worker: it lives and does nothing."""
    os.kill(run.groups()[-1].pids[rank], signal.SIGSTOP)
    return f"SIGSTOP of rank {rank}"


def kill_controller(cluster: NodeCluster) -> str:
    """SIGKILL of Ray Train's controller."""
    below = [child for pid in raylet_pids(cluster.head) for child in descendants(pid)]
    pids = with_command("ray::TrainController", below)
    if not pids:
        raise LookupError("no controller of Ray Train runs on the head node")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return "SIGKILL of the Ray Train controller"


def kill_driver(run: Run) -> str:
    """SIGKILL of the stage's job."""
    pids = [pid for pid in with_command("pipelines.job", all_pids()) if _mentions(pid, run)]
    if not pids:
        raise LookupError("no job of this run is there")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return "SIGKILL of the driver"


def _mentions(pid: int, run: Run) -> bool:
    return bool(with_command(run.workspace, [pid]))


def wait_for_end(pids: dict[int, int], timeout_s: float = FOUND_TIMEOUT_S) -> float:
    """Seconds until all workers of a group have ended: then the fault was found and cleared."""
    return wait_until(
        f"the end of processes {sorted(pids.values())}",
        lambda: not any(is_alive(pid) for pid in pids.values()),
        timeout_s,
    )


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of a few MB at a folder; False where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(folder: Path) -> Callable[[], None]:
    """Write a file until the disk is full; returns what removes it."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as target, suppress(OSError):
        while target.write(bytes(BALLAST_BYTES)) == BALLAST_BYTES:
            pass
    return ballast.unlink


def forbid_growth(pid: int, num_bytes: int) -> Callable[[], None]:
    """Let a process write no file beyond a size, as on a full disk; returns what lifts that."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, before[1]))

    def lift() -> None:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)

    return lift
