"""The Prefect API of a `drorae run`: the configured server if it answers, else a private one.

The private server keeps its database in the workspace, so that earlier runs stay visible, loads no
UI and no background services, and ends with the run. Measured on 2 cores: 11 s with a fresh
database, 4 s later. It starts before Prefect is imported, because Prefect reads its settings from
the environment at import.
"""

import fcntl
import logging
import os
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipelines import children
from pipelines.plain_path import plain_path

START_TIMEOUT_S = 180.0
MAX_HOMES = 64
QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # Stages report through the display; Prefect's own lines go to its database only.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
}
EPHEMERAL = {
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    "PREFECT_UI_ENABLED": "0",
    # Nobody sees them: the stages have log files of their own.
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
}

log = logging.getLogger(__name__)


def configured_url(environment: dict[str, str], folder: Path) -> str | None:
    """Return the API that Prefect would use: environment, then prefect.toml, then the profile."""
    if environment.get("PREFECT_API_URL"):
        return environment["PREFECT_API_URL"]
    local = _read_toml(folder / "prefect.toml").get("api", {}).get("url")
    if local:
        return str(local)
    home = Path(environment.get("PREFECT_HOME") or "~/.prefect").expanduser()
    profiles = _read_toml(home / "profiles.toml")
    active = environment.get("PREFECT_PROFILE") or profiles.get("active")
    return profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL")


def _read_toml(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML ({error}); correct or delete it.") from error


def is_healthy(url: str, timeout_s: float = 2.0) -> bool:
    """Return whether a Prefect API answers."""
    # No proxy: the server is ours or on our network.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url.rstrip('/')}/health", timeout=timeout_s) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError, ValueError):
        return False


@contextmanager
def prefect_api(root: Path) -> Iterator[subprocess.Popen | None]:
    """Point Prefect at a server for the time of a run; enter before importing Prefect.

    The server is only started here: call `wait_until_ready` before the first request.

    Args:
        root: Local folder of the workspace, for a private server's database and log.

    Yields:
        The private server's process; None for the configured server.
    """
    url = configured_url(dict(os.environ), Path.cwd())
    if url and is_healthy(url):
        os.environ.update(QUIET | {"PREFECT_API_URL": url})
        yield None
        return
    if url:
        log.warning("the Prefect server at %s does not answer; this run uses one of its own.", url)
    with ExitStack() as stack:
        home = stack.enter_context(_private_home(plain_path(root) / "prefect"))
        port = _free_port()
        os.environ.update(
            QUIET
            | EPHEMERAL
            | {"PREFECT_HOME": str(home), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
            | {"PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home}/prefect.db"}
        )
        command = [sys.executable, "-m", "pipelines.children", "uvicorn"]
        command += ["--factory", "prefect.server.api.server:create_app", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--log-level", "error", "--lifespan", "on"]
        process = children.spawn(command, log_path=home / "server.log", env={})
        stack.callback(children.stop, process, 5.0)
        yield process


def wait_until_ready(process: subprocess.Popen | None = None) -> None:
    """Wait until the server that `prefect_api` chose answers.

    Args:
        process: The private server's process; its end ends the waiting.

    Raises:
        RuntimeError: If it does not.
    """
    url = os.environ["PREFECT_API_URL"]
    deadline = time.monotonic() + START_TIMEOUT_S
    while not is_healthy(url):
        if process is not None and process.poll() is not None:
            raise RuntimeError(
                f"the private Prefect server ended with exit code {process.returncode} before it "
                "answered; see prefect/*/server.log in the workspace."
            )
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"the Prefect server at {url} did not start in {START_TIMEOUT_S:.0f} s; "
                "see prefect/*/server.log in the workspace."
            )
        time.sleep(0.1)


@contextmanager
def _private_home(parent: Path) -> Iterator[Path]:
    """Hold a home folder that no other run uses: servers that share a SQLite file lock it."""
    for number in range(MAX_HOMES):
        home = parent / str(number)
        home.mkdir(parents=True, exist_ok=True)
        with (home / "lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield home
            return
    raise RuntimeError(f"all {MAX_HOMES} folders under {parent} are in use; end some of the runs.")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
