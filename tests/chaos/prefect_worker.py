"""A Prefect server with a worker, and the fake graph of the pipeline tests as its deployment.

No Ray and no MLflow: what is tried here is who goes on with a flow run whose worker is killed.
"""

import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.chaos.cluster import REPOSITORY
from tests.chaos.journal import wait_until
from tests.chaos.processes import all_pids, end_all, with_variable

BIN = Path(sys.executable).parent
START_TIMEOUT_S = 120.0
PARTS = ["tests/integration/fake_site", "", "tests/pipelines"]


class PrefectServices:
    """Server, pool and deployments; `running` makes them.

    Args:
        folder: Folder of everything: database, logs, workspace.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "DRORAE_"))}
        self._environment = kept | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(str(REPOSITORY / part) for part in PARTS),
            "FAKE_JOURNAL": str(folder / "fake.jsonl"),
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_API_URL": f"http://127.0.0.1:{self._port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DRORAE_TRACKING_URI": "none",
        }

    def start(self) -> None:
        """Start the server and register the deployments."""
        self._spawn("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self._port))
        wait_until("the Prefect server", self._answers, START_TIMEOUT_S)
        self.call("prefect", "work-pool", "create", "drorae", "--type", "process", "--overwrite")
        self.call("python", "-m", "pipelines.deployments", "--directory", str(self.folder))

    def start_worker(self) -> subprocess.Popen:
        """Start a worker."""
        return self._spawn("prefect", "worker", "start", "--pool", "drorae", "--limit", "2")

    def deploy(self, *more: str) -> str:
        """Start the whole graph, with stage c slow; returns what Prefect says."""
        parameters = {"recipe": "fake", "workspace": str(self.folder / "workspace")}
        words = [w for name, value in parameters.items() for w in ("--param", f"{name}={value}")]
        words += ["--param", 'overrides=["c.sleep_s=10"]', *more]
        return self.call("prefect", "deployment", "run", "drorae/full", *words)

    def call(self, *words: str) -> str:
        """Run a command against the server.

        Raises:
            RuntimeError: It failed.
        """
        done = subprocess.run(
            [str(BIN / words[0]), *words[1:]],
            env=self._environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)}: {(done.stdout + done.stderr)[-800:]}")
        return done.stdout

    def events(self, event: str, stage: str | None = None) -> list[dict[str, Any]]:
        """What the stages of the fake graph noted."""
        path = self.folder / "fake.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        notes = [json.loads(line) for line in lines]
        return [n for n in notes if n["event"] == event and stage in (None, n["stage"])]

    def step_of_c(self) -> int:
        """Checkpoint of the slow stage, a step from 0 to 10."""
        found = list(self.folder.glob("workspace/stages/c/*/_work/checkpoint"))
        return int(found[0].read_text() or 0) if found else 0

    def _spawn(self, *words: str) -> subprocess.Popen:
        with (self.folder / f"{words[1]}.log").open("ab") as log:
            return subprocess.Popen(
                [str(BIN / words[0]), *words[1:]],
                env=self._environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/api/health", timeout=2):
                return True
        except OSError:
            return False


@contextmanager
def running(folder: Path) -> Iterator[PrefectServices]:
    """Services in a folder; nothing that they started is left afterwards."""
    folder.mkdir(parents=True)
    services = PrefectServices(folder)
    try:
        services.start()
        yield services
    finally:
        end_all(with_variable(f"PREFECT_HOME={folder / 'home'}", all_pids()), grace_s=0.0)
