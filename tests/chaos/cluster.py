"""A Ray cluster of several nodes on this machine, each node a set of processes that can be killed.

The head takes the driver and Ray Train's controller; each other node has room for one rank, so the
node of a rank is known and another one can take its place.
"""

import os
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipelines import ray_head
from tests.chaos.processes import all_pids, descendants, end_all, parent_of, with_command

REPOSITORY = Path(__file__).parents[2]
STORE_BYTES = 80 << 20
TOKEN = secrets.token_hex(16)
"""For all clusters of this process: Ray reads it once."""


class NodeCluster:
    """Nodes of a local cluster; `running` makes one."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster  # half a second

        self._cluster = Cluster(shutdown_at_exit=False)
        # Its server for health checks takes a port even without a dashboard.
        self._add(num_cpus=0, num_gpus=0, include_dashboard=False, dashboard_port=_free_port())

    @property
    def head(self) -> Any:
        """The node of the driver and of Ray Train's controller."""
        return self._cluster.head_node

    @property
    def address(self) -> str:
        """Address for RAY_ADDRESS."""
        return str(self._cluster.address)

    def add_node(self, num_gpus: int = 0) -> Any:
        """Start a node with room for one rank, which may declare GPUs."""
        return self._add(num_cpus=1, num_gpus=num_gpus)

    def _add(self, **arguments: Any) -> Any:
        return self._cluster.add_node(object_store_memory=STORE_BYTES, **arguments)

    def node_of(self, pid: int) -> Any:
        """The node that runs a worker process."""
        for node in self._cluster.worker_nodes:
            if parent_of(pid) in raylet_pids(node):
                return node
        raise LookupError(f"process {pid} belongs to no node of this cluster")

    def kill_node(self, node: Any) -> None:
        """End all processes of a node at once, as when its machine loses power."""
        parents = raylet_pids(node)
        children = [child for parent in parents for child in descendants(parent)]
        for pid in parents + children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        """End every process of the cluster."""
        nodes = self._cluster.list_all_nodes()
        pids = [pid for node in nodes for pid in raylet_pids(node)]
        left = [child for pid in pids for child in descendants(pid)]
        for node in nodes:
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        end_all(left)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def raylet_pids(node: Any) -> list[int]:
    """Processes of a node that start others."""
    return [info.process.pid for infos in node.all_processes.values() for info in infos]


@contextmanager
def running(
    num_nodes: int, environment: Mapping[str, str], *, num_gpus: int = 0
) -> Iterator[NodeCluster]:
    """A cluster with a head and so many nodes; this process's environment points at it.

    Args:
        num_nodes: Nodes beside the head.
        environment: Variables of all its processes, and of this one meanwhile.
        num_gpus: GPUs that each node declares, but not the head.
    """
    # Short: a Unix socket path has at most 107 bytes, and Ray appends about 80.
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    (folder / "ray").mkdir()
    before = dict(os.environ)
    os.environ.update({**ray_head.ENVIRONMENT, **environment, "RAY_TMPDIR": str(folder)})
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    # The workers import the stage from here.
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    cluster = None
    try:
        cluster = NodeCluster()
        for _ in range(num_nodes):
            cluster.add_node(num_gpus)
        os.environ["RAY_ADDRESS"] = cluster.address
        yield cluster
    finally:
        if cluster is not None:
            cluster.close()
        end_all(with_command(str(folder), all_pids()), grace_s=0.0)
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)
