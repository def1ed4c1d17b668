"""One local Ray for the stage jobs of a run, started on demand and gone with the run.

`RayHead` lives in the driver and starts `python -m pipelines.ray_head FOLDER`, which holds the
cluster and writes its address to FOLDER/address. It loads no dashboard and asks for a token made
for this run (Ray listens on all interfaces). The logical CPUs are oversubscribed: data actors and
training workers would otherwise starve one another of slots and wait for ever. Measured on 2 cores:
4 s to start, 0.5 s to connect.
"""

import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from pipelines import children

OBJECT_STORE_BYTES = 300 << 20
LOGICAL_CPUS_AT_LEAST = 8
START_TIMEOUT_S = 180.0
START_ATTEMPTS = 3
ADDRESS_NAME = "address"
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A reported checkpoint counts only after the controller's next poll; 2 s by default loses the
    # last one in a crash.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # How long a group that is torn down waits for a rank that may be stopped; 30 s by default.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "10",
    # Two stages share the cores. OpenMP threads that spin while they wait take them from each
    # other: a decoder step with 2 threads beside another job took 1475 ms spinning and 185 ms
    # passive (2026-11-22, 2 cores).
    "OMP_WAIT_POLICY": "PASSIVE",
    # One machine is never preempted; the watcher is one process and 2.5 s of start-up for every
    # training stage.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}

log = logging.getLogger(__name__)


class RayHead:
    """The driver's handle on the local Ray of a run.

    Args:
        log_path: Log of the holding process.
    """

    def __init__(self, log_path: Path):
        self._log_path = log_path
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._folder: Path | None = None
        self._token = secrets.token_hex(16)

    def environment(self) -> dict[str, str]:
        """Return the variables with which a process may connect."""
        return {**ENVIRONMENT, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token}

    def ensure_started(self) -> Path:
        """Start Ray in the background unless it is up; returns the file for its address."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._remove_folder()
                # Short: a Unix socket path has at most 107 bytes, and Ray appends about 70.
                root = "/tmp" if os.access("/tmp", os.W_OK) else None
                self._folder = Path(tempfile.mkdtemp(prefix="drorae-ray-", dir=root))
                command = [sys.executable, "-m", "pipelines.ray_head", str(self._folder)]
                self._process = children.spawn(
                    command, log_path=self._log_path, env=self.environment()
                )
            assert self._folder is not None
            return self._folder / ADDRESS_NAME

    def close(self) -> None:
        """Stop Ray, if it was started, and remove its folder."""
        with self._lock:
            if self._process is not None:
                children.stop(self._process, grace_s=15.0)
                self._process = None
            self._remove_folder()

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def wait_for_address(address_path: Path) -> str:
    """Wait until the local Ray is up, and return its address.

    Raises:
        RuntimeError: If it does not come up.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and address_path.parent.exists():
        if address_path.exists():
            return address_path.read_text()
        time.sleep(0.1)
    raise RuntimeError(
        f"the local Ray of this run did not start ({address_path} has no address); "
        "its reasons are in logs/ray.log of the workspace."
    )


def hold(folder: Path) -> None:
    """Start Ray, write its address, wait until the parent closes our input, and stop it."""
    import ray  # takes half a second, and the driver imports this module without needing it

    try:
        partial = folder / "address.partial"
        partial.write_text(_start(folder))
        partial.rename(folder / ADDRESS_NAME)
        while os.read(0, 4096):
            pass
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path) -> str:
    import ray

    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(
                num_cpus=max(LOGICAL_CPUS_AT_LEAST, 4 * (os.cpu_count() or 1)),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.WARNING,
                _temp_dir=str(folder / "r"),
            )
        except Exception:
            # Ray gives its node 30 s to start, too few on a busy machine.
            log.exception("Ray did not start, attempt %d of %d", attempt, START_ATTEMPTS)
            ray.shutdown()
            if attempt == START_ATTEMPTS:
                raise
        else:
            return ray.get_runtime_context().gcs_address
    raise AssertionError("unreachable")


if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    hold(Path(sys.argv[1]))
