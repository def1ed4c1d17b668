"""The scenarios: what happens to a run, and what has to come of it.

Each is a function of the bench, the row that it fills and its own draws. One that starts nothing
but a program of its own needs no cluster.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.chaos import faults, prefect_worker
from tests.chaos.bench import Bench
from tests.chaos.cluster import NodeCluster
from tests.chaos.disturbed import disturbed
from tests.chaos.faults import Moment, wait_for_end
from tests.chaos.journal import wait_until
from tests.chaos.mlflow_scenarios import mlflow_away, mlflow_kill
from tests.chaos.product import COMPUTE, Run, alone
from tests.chaos.proxy import Proxy
from tests.chaos.table import Row
from tests.integration.s3_server import S3Server, running_s3_server

Scenario = Callable[[Bench, Row, random.Random], None]

S3_OUTAGE_S = 30.0
DISK_FULL_S = 15.0
NODE_BACK_AFTER_S = 8.0
NUM_BROKEN_UPLOADS = 50
NUM_ELASTIC_STEPS = 320  # with one rank, more than Ray waits until it looks for another


def worker(bench: Bench, row: Row, draw: random.Random) -> None:
    """SIGKILL of a worker."""
    rank = draw.randrange(2)
    disturbed(bench, row, draw, lambda run, cluster: faults.kill_rank(run, rank))


def controller(bench: Bench, row: Row, draw: random.Random) -> None:
    """SIGKILL of the Ray Train controller; the driver starts another one."""
    disturbed(bench, row, draw, lambda run, cluster: faults.kill_controller(cluster))


def driver(bench: Bench, row: Row, draw: random.Random) -> None:
    """SIGKILL of the stage's job; the next attempt continues."""
    disturbed(bench, row, draw, lambda run, cluster: faults.kill_driver(run), attempts=2)


def stopped(bench: Bench, row: Row, draw: random.Random) -> None:
    """SIGSTOP of a rank: its process answers nothing."""
    rank = draw.randrange(2)
    disturbed(bench, row, draw, lambda run, cluster: faults.stop_rank(run, rank))


def hung(bench: Bench, row: Row, draw: random.Random) -> None:
    """A rank whose process lives and whose loop stands still for ever."""

    def hang(run: Run, cluster: NodeCluster) -> str:
        Path(run.hang_path).touch()
        return "loop of rank 1 stands still"

    disturbed(bench, row, draw, hang)


def node(bench: Bench, row: Row, draw: random.Random) -> None:
    """SIGKILL of all processes of a node; another node comes later."""
    rank = draw.randrange(2)

    def kill(run: Run, cluster: NodeCluster) -> str:
        cluster.kill_node(cluster.node_of(run.groups()[-1].pids[rank]))
        return f"SIGKILL of the node of rank {rank}"

    def replace_node(cluster: NodeCluster) -> None:
        time.sleep(NODE_BACK_AFTER_S)
        cluster.add_node()

    try:
        disturbed(bench, row, draw, kill, then=replace_node)
    finally:
        bench.discard_cluster()


def three_kills(bench: Bench, row: Row, draw: random.Random) -> None:
    """SIGKILL of a worker three times; every sample counts once an epoch."""
    bench.undisturbed()
    bench.cluster()
    run = bench.run(row.scenario)
    run.start()
    told = []
    for number, (first, last) in enumerate(((6, 12), (16, 22), (26, 32))):
        moment = Moment(draw, first, last)
        moment.wait(run, earlier_groups=number)
        told.append(f"{faults.kill_rank(run, draw.randrange(2))} {moment}")
    row.done = ", ".join(told)
    bench.conclude(row, run)
    if row.groups != 4:
        row.problems.append(f"{row.groups} groups of workers: expected 4")


def disk_full(bench: Bench, row: Row, draw: random.Random) -> None:
    """The disk of the workspace has no room for a while."""
    bench.undisturbed()
    bench.cluster()
    folder = bench.folder / row.scenario / "disk"
    with faults.small_disk(folder) as mounted:
        run = bench.run(row.scenario, workspace=str(folder / "workspace"))
        run.start()
        moment = Moment(draw, last_step=20)
        moment.wait(run)
        if mounted:
            free = faults.fill(folder)
        else:
            free = faults.forbid_growth(run.groups()[-1].pids[0], 4096)
        time.sleep(DISK_FULL_S)
        row.problems += _must_wait(run)
        free()
        kind = "disk full" if mounted else "rank 0 may write no file over 4 kB"
        row.done = f"{kind} for {DISK_FULL_S:.0f} s, {moment}"
        bench.conclude(row, run)


def _must_wait(run: Run) -> list[str]:
    return [] if run.is_running() else ["the run ended meanwhile: the fault did not touch it"]


def s3_down(bench: Bench, row: Row, draw: random.Random) -> None:
    """The S3 server that holds the workspace is killed, and is back after 30 s."""

    def take_down(run: Run, server: S3Server, proxy: Proxy) -> str:
        moment = Moment(draw)
        moment.wait(run)
        server.kill()
        time.sleep(S3_OUTAGE_S)
        row.problems += _must_wait(run)
        server.start()
        return f"S3 server down for {S3_OUTAGE_S:.0f} s, {moment}"

    _on_s3(bench, row, take_down)


def s3_busy(bench: Bench, row: Row, draw: random.Random) -> None:
    """The S3 server answers 503 to 5 % of all requests."""

    def refuse(run: Run, server: S3Server, proxy: Proxy) -> str:
        wait_until("the end", lambda: not run.is_running(), 240)
        return f"503 to {proxy.num_refused} of {proxy.num_requests} S3 requests"

    _on_s3(bench, row, refuse, share_refused=0.05)


def _on_s3(
    bench: Bench,
    row: Row,
    disturb: Callable[[Run, S3Server, Proxy], str],
    share_refused: float = 0.0,
) -> None:
    bench.undisturbed()
    with running_s3_server() as server:
        proxy = Proxy(server.endpoint, seed=1)
        environment = {**server.environment, "AWS_ENDPOINT_URL": proxy.endpoint}
        environment["DRORAE_CACHE"] = str(bench.folder / "cache")
        try:
            bench.cluster(environment)
            workspace = f"s3://{server.new_bucket()}/chaos"
            run = bench.run(row.scenario, workspace=workspace)
            proxy.share_refused = share_refused
            run.start()
            row.done = disturb(run, server, proxy)
            bench.conclude(row, run)
            if row.groups > 1:
                row.problems.append("the workers were restarted: expected the same to go on")
        finally:
            bench.discard_cluster()
            proxy.close()


def upload_killed(bench: Bench, row: Row, draw: random.Random) -> None:
    """A process that is killed at 50 random bytes of a checkpoint: the older one counts."""
    folder = bench.folder / row.scenario
    folder.mkdir()
    _break_uploads(row, str(folder), draw, {}, "kill")


def upload_cut(bench: Bench, row: Row, draw: random.Random) -> None:
    """The same on S3: the upload breaks at 50 random bytes of a checkpoint."""
    with running_s3_server() as server:
        root = f"s3://{server.new_bucket()}/cut"
        _break_uploads(row, root, draw, server.environment, "end of an S3 upload")


def _break_uploads(
    row: Row, root: str, draw: random.Random, environment: dict[str, str], what: str
) -> None:
    seed = str(draw.randrange(1 << 30))
    program = [sys.executable, "-m", "tests.chaos.uploads", root, seed, str(NUM_BROKEN_UPLOADS)]
    done = subprocess.run(
        program, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    if done.returncode != 0:
        row.problems.append(done.stderr[-500:])
        return
    told = json.loads(done.stdout)
    row.done = f"{what} at {NUM_BROKEN_UPLOADS} random bytes of a checkpoint of {told['bytes']}"
    row.equal = not told["problems"]
    row.problems += told["problems"]


def elastic(bench: Bench, row: Row, draw: random.Random) -> None:
    """A node is lost and comes back late: the run goes on with one rank, then with two again."""
    compute = replace(COMPUTE, min_workers=1)
    run = bench.run(row.scenario, compute=compute, num_steps=NUM_ELASTIC_STEPS)
    try:
        cluster = bench.cluster()
        run.start()
        moment = Moment(draw)
        moment.wait(run)
        pids = run.groups()[-1].pids
        cluster.kill_node(cluster.node_of(pids[draw.randrange(2)]))
        row.found_after_s = wait_for_end(pids)
        smaller = Moment(draw, moment.step + 10, moment.step + 20)
        smaller.wait(run, earlier_groups=1)
        cluster.add_node()
        row.done = f"SIGKILL of a node {moment}, another one {smaller}"
        expected = alone(bench.folder / "alone", NUM_ELASTIC_STEPS)
        bench.conclude(row, run, expected=expected, is_exact=False)
        sizes = [group.world_size for group in run.groups()]
        row.done += f"; ranks {sizes}"
        if sizes != [2, 1, 2]:
            row.problems.append(f"groups of {sizes} ranks: expected 2, 1, 2")
    finally:
        bench.discard_cluster()


def prefect(bench: Bench, row: Row, draw: random.Random) -> None:
    """SIGKILL of the Prefect worker process while a stage runs; another worker takes over."""
    with prefect_worker.running(bench.folder / row.scenario) as services:
        first = services.start_worker()
        services.deploy()
        step = draw.randint(2, 6)
        wait_until(f"step {step} of c", lambda: services.step_of_c() >= step, 120)
        first.kill()
        first.wait()
        row.done = f"SIGKILL of the Prefect worker, stage c at step {services.step_of_c()} of 10"
        services.start_worker()
        # The run that lost its worker is not started again by Prefect itself; a person, or the next
        # schedule, does. Its stage may still be under way: then it is waited for.
        services.deploy("--watch")
        built = sorted(event["stage"] for event in services.events("done"))
        row.equal = built == ["a", "b", "c", "d", "report"]
        starts = [event["step"] for event in services.events("resume", "c")]
        row.groups, row.attempts = len(starts), 2
        row.done += f"; c began at steps {starts}"
        if not row.equal:
            row.problems.append(f"built {built}: expected every stage once")
        if any(later < step for later in starts[1:]):
            row.problems.append(f"c began at steps {starts}: expected to go on from {step}")


SCENARIOS: dict[str, Scenario] = {
    "upload-killed": upload_killed,
    "upload-cut": upload_cut,
    "prefect": prefect,
    "worker": worker,
    "controller": controller,
    "driver": driver,
    "stopped": stopped,
    "hung": hung,
    "three-kills": three_kills,
    "disk-full": disk_full,
    "mlflow-away": mlflow_away,
    "mlflow-kill": mlflow_kill,
    "node": node,
    "elastic": elastic,
    "s3-down": s3_down,
    "s3-busy": s3_busy,
}
"""By name, in an order that changes the cluster seldom."""
