"""An MLflow server that goes away while a stage trains."""

import random
import statistics
import time
from collections import Counter

from tests.chaos import faults
from tests.chaos.bench import Bench
from tests.chaos.cluster import NodeCluster
from tests.chaos.disturbed import disturbed
from tests.chaos.faults import Moment
from tests.chaos.mlflow_stub import MlflowStub
from tests.chaos.product import Run
from tests.chaos.stage import NUM_STEPS
from tests.chaos.table import Row

MLFLOW_OUTAGE_S = 60.0
KILL_AFTER_S = 1.5  # a few steps whose points have nowhere to go
BACK_AFTER_S = 5.0


def mlflow_away(bench: Bench, row: Row, draw: random.Random) -> None:
    """MLflow refuses connections for 60 s: no step waits, and every point arrives afterwards."""
    bench.undisturbed()
    bench.cluster()
    server = MlflowStub()
    try:
        run = bench.run(row.scenario, tracking_uri=server.uri)
        run.start()
        moment = Moment(draw, last_step=15)
        moment.wait(run)
        server.go()
        time.sleep(MLFLOW_OUTAGE_S)
        before = len(server.points)
        server.come()
        row.done = f"MLflow away for {MLFLOW_OUTAGE_S:.0f} s, {moment}"
        bench.conclude(row, run)
        row.problems += _tracking_problems(server, run, moment.step)
        arrived = sum(name == "train/loss" for name, _, _ in server.points)
        row.done += f": {before} points before, {arrived} of {NUM_STEPS} losses arrived"
    finally:
        server.go()


def mlflow_kill(bench: Bench, row: Row, draw: random.Random) -> None:
    """SIGKILL of the rank that tracks, while MLflow is away: its points still arrive, once each."""
    server = MlflowStub()

    def kill(run: Run, cluster: NodeCluster) -> str:
        server.go()
        time.sleep(KILL_AFTER_S)
        return f"MLflow away, then {faults.kill_rank(run, 0)}"

    def come(cluster: NodeCluster) -> None:
        time.sleep(BACK_AFTER_S)
        server.come()

    try:
        disturbed(bench, row, draw, kill, then=come, tracking_uri=server.uri)
        row.problems += _missing_losses(server)
        counts = Counter(number for name, number, _ in server.points if name == "train/loss")
        if twice := sorted(number for number, count in counts.items() if count > 1):
            row.problems.append(f"losses of steps {twice} arrived more than once")
        row.done += f": {counts.total()} of {NUM_STEPS} losses arrived"
    finally:
        server.go()


def _missing_losses(server: MlflowStub) -> list[str]:
    steps = {number for name, number, _ in server.points if name == "train/loss"}
    missing = sorted(set(range(1, NUM_STEPS + 1)) - steps)
    return [f"losses of steps {missing} never arrived"] if missing else []


def _tracking_problems(server: MlflowStub, run: Run, step: int) -> list[str]:
    problems = _missing_losses(server)
    times = run.groups()[-1].times
    lengths = {number: times[number] - times[number - 1] for number in times if number - 1 in times}
    usual_s = statistics.median(s for number, s in lengths.items() if number < step)
    away_s = statistics.median(s for number, s in lengths.items() if number > step)
    if away_s > 1.5 * usual_s:
        problems.append(f"a step took {away_s:.3f} s while MLflow was away, else {usual_s:.3f} s")
    return problems
