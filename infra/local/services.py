"""Bring the services up and down on this machine: Prefect, its worker, MLflow, Ray.

`python infra/local/services.py up|down|status` (the Makefile's `make up` and `make down`).
Everything listens on loopback where the service allows it (Ray does not; it asks for a token made
here). State lies in .drorae/services/, which git ignores: process numbers, logs, databases, the Ray
token. `up` also writes prefect.toml, with which a new shell in this folder finds the server without
any variable. Every process is ended by its number, the worker before the server.
"""

import argparse
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / ".drorae" / "services"
PIDS = STATE / "pids.json"
PREFECT_TOML = ROOT / "prefect.toml"
MARK = "# Written by `make up`, removed by `make down`.\n"
BIN = Path(sys.executable).parent
HOST = "127.0.0.1"
# Outside 10002-19999, where Ray puts its workers.
PORTS = {"prefect": 4200, "mlflow": 5000, "ray": 6379, "dashboard": 8265, "agent": 52365}
START_TIMEOUT_S = 180.0
GRACE_S = 20.0
WORKER_GRACE_S = 40.0
OBJECT_STORE_BYTES = 500 << 20
RAY_RESTARTS = 2
# The worker first: without its server it does not end.
STOP_ORDER = ("worker", "ray", "mlflow", "prefect")


def say(text: str) -> None:
    """Write one line."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def read_state() -> dict:
    """Return what `up` recorded; empty when nothing is up."""
    return json.loads(PIDS.read_text()) if PIDS.exists() else {}


def write_state(state: dict) -> None:
    """Record ports, folders and process numbers."""
    STATE.mkdir(parents=True, exist_ok=True)
    PIDS.write_text(json.dumps(state, indent=1))


def started_at(pid: int) -> str | None:
    """Return when a process started, which tells a reused number; None when it is gone."""
    answer = subprocess.run(
        ["ps", "-o", "lstart=,stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    *start, state = answer.stdout.split() or ["Z"]
    return " ".join(start) if start and not state.startswith("Z") else None


def is_running(entry: dict) -> bool:
    """Return whether a recorded process still runs."""
    return started_at(entry["pid"]) == entry["started"]


def free_port(preferred: int) -> int:
    """Return the preferred port, or the next free one."""
    for port in range(preferred, preferred + 50):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))  # fails beside a listener on any address of this machine
            except OSError:
                continue
            return port
    raise SystemExit(f"services: error: ports {preferred} to {preferred + 49} are all in use.")


def state_link(state: dict) -> Path:
    """Return a plain name of STATE: databases are named by URLs, in which `?` or `%` mean more."""
    link = Path(state["ray_folder"]) / "state"
    if not link.is_symlink():
        link.symlink_to(STATE)
    return link


def environment(state: dict) -> dict[str, str]:
    """Return the variables that every service gets."""
    ports = state["ports"]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    return {
        **inherited,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "DO_NOT_TRACK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": state["token"],
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_HOME": str(state_link(state) / "prefect"),
        "PREFECT_API_URL": f"http://{HOST}:{ports['prefect']}/api",
        "DRORAE_RAY_ADDRESS": f"http://{HOST}:{ports['dashboard']}",
        "DRORAE_TRACKING_URI": f"http://{HOST}:{ports['mlflow']}",
    }


def commands(state: dict) -> dict[str, list[str]]:
    """Return the command line of every service."""
    ports = {name: str(port) for name, port in state["ports"].items()}
    database = state_link(state) / "mlflow" / "mlflow.db"
    return {
        "prefect": ["prefect", "server", "start", "--host", HOST, "--port", ports["prefect"]],
        "mlflow": [
            *("mlflow", "server", "--host", HOST, "--port", ports["mlflow"], "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{database}"),
            *("--artifacts-destination", str(STATE / "mlflow" / "artifacts")),
        ],
        "ray": [
            *("ray", "start", "--head", "--block", "--disable-usage-stats"),
            *("--port", ports["ray"], "--dashboard-host", HOST),
            *("--dashboard-port", ports["dashboard"], "--include-dashboard=true"),
            # Takes the jobs; a second Ray on this machine would hold the default port.
            *("--dashboard-agent-listen-port", ports["agent"]),
            *("--num-cpus", str(max(16, 4 * (os.cpu_count() or 1)))),
            *("--object-store-memory", str(OBJECT_STORE_BYTES), "--temp-dir", state["ray_folder"]),
        ],
        "worker": ["prefect", "worker", "start", "--pool", "drorae", "--limit", "4"],
    }


def start(state: dict, name: str) -> None:
    """Start one service in its own session and record it."""
    command = commands(state)[name]
    (STATE / "logs").mkdir(parents=True, exist_ok=True)
    with (STATE / "logs" / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            cwd=ROOT,
            env=environment(state),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    state["processes"][name] = {"pid": process.pid, "started": started_at(process.pid)}
    write_state(state)


def answers(url: str) -> bool:
    """Return whether a URL answers without a server error."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (urllib.error.URLError, OSError):
        return False


def wait_for(state: dict, name: str, is_ready: Callable[[], bool]) -> None:
    """Wait until a service is ready; end all and explain if it is not."""
    deadline = time.monotonic() + START_TIMEOUT_S
    restarts = RAY_RESTARTS if name == "ray" else 0
    while not is_ready():
        died = not is_running(state["processes"][name])
        if died and restarts:
            restarts -= 1
            start(state, name)
        elif died or time.monotonic() > deadline:
            log = STATE / "logs" / f"{name}.log"
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            down()
            why = "ended" if died else f"is not ready after {START_TIMEOUT_S:.0f} s"
            raise SystemExit(f"services: error: {name} {why}:\n{tail}")
        time.sleep(0.3)


def run(state: dict, *command: str) -> None:
    """Run a command against the services, and explain a failure."""
    answer = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=ROOT,
        env=environment(state),
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode != 0:
        down()
        raise SystemExit(f"services: error: {' '.join(command)}:\n{answer.stdout}{answer.stderr}")


def new_state() -> dict:
    """Choose ports, a token, and a short folder for Ray (a socket path has at most 107 bytes)."""
    root = "/tmp" if os.access("/tmp", os.W_OK) else None
    return {
        "ports": {name: free_port(port) for name, port in PORTS.items()},
        "token": secrets.token_hex(16),
        "ray_folder": tempfile.mkdtemp(prefix="drorae-ray-", dir=root),
        "processes": {},
    }


def up() -> None:
    """Start what is not running, register the deployments, and print where everything is."""
    state = read_state()
    if state and not all(is_running(entry) for entry in state["processes"].values()):
        say("services: some of them died; starting all again")
        down()
        state = {}
    if not state:
        if PREFECT_TOML.exists() and not PREFECT_TOML.read_text().startswith(MARK):
            raise SystemExit(f"services: error: {PREFECT_TOML} is not ours; move it away first.")
        state = new_state()
        STATE.mkdir(parents=True, exist_ok=True)
        STATE.chmod(0o700)  # pids.json holds the token
        start_all(state)
    say_where(state)


def start_all(state: dict) -> None:
    """Start all services, the slow ones at the same time."""
    (STATE / "mlflow" / "artifacts").mkdir(parents=True, exist_ok=True)
    ports = state["ports"]
    start(state, "prefect")
    start(state, "mlflow")
    prefect = f"http://{HOST}:{ports['prefect']}/api"
    dashboard = f"http://{HOST}:{ports['dashboard']}/api/version"
    wait_for(state, "prefect", lambda: answers(f"{prefect}/health"))
    run(state, "prefect", "work-pool", "create", "drorae", "--type", "process", "--overwrite")
    # Not beside the two above: Ray gives its node 30 s to start, too few on a busy machine.
    start(state, "ray")
    wait_for(state, "ray", lambda: answers(dashboard))
    start(state, "worker")
    run(state, "python", "-m", "pipelines.deployments", "--directory", str(ROOT))
    PREFECT_TOML.write_text(f'{MARK}[api]\nurl = "{prefect}"\n')
    wait_for(state, "mlflow", lambda: answers(f"http://{HOST}:{ports['mlflow']}/health"))
    wait_for(state, "worker", lambda: is_running(state["processes"]["worker"]))


def say_where(state: dict) -> None:
    """Print the addresses and what to type."""
    ports = state["ports"]
    say(f"Prefect  http://{HOST}:{ports['prefect']}")
    say(f"MLflow   http://{HOST}:{ports['mlflow']}")
    say(f"Ray      http://{HOST}:{ports['dashboard']}  (token in {PIDS.relative_to(ROOT)})")
    say("now, in this folder: prefect deployment run drorae/full --watch")


def down() -> None:
    """End all services and remove what only the running ones needed; databases and logs stay."""
    state = read_state()
    processes = state.get("processes", {})
    for name in STOP_ORDER:
        if name in processes:
            stop(name, processes[name])
    if state:
        shutil.rmtree(state["ray_folder"], ignore_errors=True)
    PIDS.unlink(missing_ok=True)
    if PREFECT_TOML.exists() and PREFECT_TOML.read_text().startswith(MARK):
        PREFECT_TOML.unlink()
    say("services: all down")


def stop(name: str, entry: dict) -> None:
    """End one service and all that it started: SIGTERM, some time, SIGKILL."""
    members = descendants(entry["pid"]) if is_running(entry) else []
    known = {pid: started_at(pid) for pid in [entry["pid"], *members]}
    if is_running(entry):
        os.kill(entry["pid"], signal.SIGTERM)
        deadline = time.monotonic() + (WORKER_GRACE_S if name == "worker" else GRACE_S)
        while is_running(entry) and time.monotonic() < deadline:
            time.sleep(0.2)
    for pid, start_text in known.items():
        if start_text is not None and started_at(pid) == start_text:
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Return the processes that a process started, directly or not."""
    answer = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    children: dict[int, list[int]] = {}
    for line in answer.stdout.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def status() -> int:
    """Print which services run; exit code 1 if one does not."""
    processes = read_state().get("processes", {})
    running = {name: name in processes and is_running(processes[name]) for name in STOP_ORDER}
    for name, is_up in running.items():
        say(f"{name:<8} {'up' if is_up else 'down'}")
    return 0 if all(running.values()) else 1


def main() -> int:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["up", "down", "status"])
    command = parser.parse_args().command
    if command == "status":
        return status()
    (up if command == "up" else down)()
    return 0


if __name__ == "__main__":
    sys.exit(main())
