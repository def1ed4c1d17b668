"""One fault in a run, and what has to come of it."""

import random
from collections.abc import Callable

from tests.chaos.bench import Bench
from tests.chaos.cluster import NodeCluster
from tests.chaos.faults import Moment, wait_for_end
from tests.chaos.product import Run
from tests.chaos.table import Row


def disturbed(
    bench: Bench,
    row: Row,
    draw: random.Random,
    fault: Callable[[Run, NodeCluster], str],
    *,
    attempts: int = 1,
    then: Callable[[NodeCluster], None] = lambda cluster: None,
    tracking_uri: str | None = None,
) -> None:
    """One fault at a random moment: its group of workers has to end and another to follow."""
    bench.undisturbed()
    cluster = bench.cluster()
    hang_path = str(bench.folder / f"hang-{row.scenario}")
    run = bench.run(row.scenario, hang_path=hang_path, tracking_uri=tracking_uri)
    run.start()
    moment = Moment(draw)
    moment.wait(run)
    pids = run.groups()[-1].pids
    row.done = f"{fault(run, cluster)} {moment}"
    row.found_after_s = wait_for_end(pids)
    then(cluster)
    bench.conclude(row, run, attempts=attempts)
    if len(run.groups()) < 2:
        row.problems.append("no second group of workers: the fault did not hit the run")
