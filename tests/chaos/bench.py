"""Where scenarios run: folders, a cluster that is used again while it is whole, the comparison.

Every scenario has a workspace and a journal of its own. A cluster that lost a node, or in which a
scenario failed, is replaced before the next one.
"""

import math
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.chaos import cluster
from tests.chaos.cluster import NodeCluster
from tests.chaos.journal import order_errors, steps_redone
from tests.chaos.product import COMPUTE, Outcome, Run
from tests.chaos.stage import SAVE_EVERY_STEPS
from tests.chaos.table import Row

NUM_RANKS = 2
FINISH_TIMEOUT_S = 240.0
LOSS_TOLERANCE = 1e-3
"""Of the losses of hundreds of steps in float32 on 1 and on 2 ranks."""


class Bench:
    """Resources of one call of the harness; use as a context manager.

    Args:
        hang_timeout_s: `compute.hang_timeout_s` of the runs.
    """

    def __init__(self, hang_timeout_s: float = COMPUTE.hang_timeout_s) -> None:
        self.compute = replace(COMPUTE, hang_timeout_s=hang_timeout_s)
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-runs-", dir="/tmp"))
        self._cluster_stack = ExitStack()
        self._cluster: NodeCluster | None = None
        self._environment: dict[str, str] = {}
        self._undisturbed: Outcome | None = None
        self._runs: list[Run] = []

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *error: object) -> None:
        self.end_runs()
        self.discard_cluster()
        shutil.rmtree(self.folder, ignore_errors=True)

    def cluster(self, environment: Mapping[str, str] | None = None) -> NodeCluster:
        """A cluster whose processes have these variables, and a node for every rank."""
        wanted = {"TMPDIR": str(self.folder / "tmp"), **(environment or {})}
        if self._cluster is None or self._environment != wanted:
            self.discard_cluster()
            (self.folder / "tmp").mkdir(exist_ok=True)
            self._environment = wanted
            self._cluster = self._cluster_stack.enter_context(cluster.running(NUM_RANKS, wanted))
        return self._cluster

    def discard_cluster(self) -> None:
        """End the cluster; the next scenario gets a fresh one."""
        self._cluster = None
        self._cluster_stack.close()

    def run(self, name: str, **options: Any) -> Run:
        """A run that has not been started, with an own folder."""
        folder = self.folder / name
        options = {"workspace": str(folder / "workspace"), "compute": self.compute} | options
        self._runs.append(Run(folder=folder, **options))
        return self._runs[-1]

    def end_runs(self) -> None:
        """Stop what a scenario left running."""
        while self._runs:
            self._runs.pop().stop()

    def undisturbed(self) -> Outcome:
        """Weights and losses of a run that nothing happens to; made once."""
        if self._undisturbed is None:
            self.cluster()
            run = self.run("undisturbed")
            run.start()
            self._undisturbed = run.finish(FINISH_TIMEOUT_S)
        return self._undisturbed

    def conclude(
        self,
        row: Row,
        run: Run,
        *,
        attempts: int = 1,
        expected: Outcome | None = None,
        is_exact: bool = True,
    ) -> None:
        """Wait for the end of a disturbed run and fill its row.

        Args:
            row: What is filled.
            run: The run.
            attempts: Jobs that it may take.
            expected: What has to come of it; none: what came of the undisturbed run.
            is_exact: Whether to the last bit; else losses within `LOSS_TOLERANCE`, as of two runs
                on other numbers of ranks, which add in another order.
        """
        expected = expected or self._undisturbed
        assert expected is not None, "the undisturbed run comes first"
        try:
            outcome = run.finish(FINISH_TIMEOUT_S)
        except Exception as error:
            row.problems.append(f"the stage did not end well: {error}")
            row.attempts, row.groups = run.attempts, len(run.groups())
            return
        groups = run.groups()
        row.attempts, row.groups, row.steps_redone = run.attempts, len(groups), steps_redone(groups)
        row.equal = outcome == expected if is_exact else None
        gap = _loss_gap(expected, outcome)
        if not is_exact:
            row.done += f"; losses within {gap:.1e}"
        if row.equal is False or gap > LOSS_TOLERANCE:
            row.problems.append(f"another result: {_differences(expected, outcome)}")
        if run.attempts > attempts:
            row.problems.append(f"{run.attempts} attempts instead of {attempts}: {run.errors}")
        # One more step may have begun while the newest checkpoint was being written.
        if any(redone > SAVE_EVERY_STEPS + 1 for redone in row.steps_redone):
            row.problems.append(f"more than an interval of {SAVE_EVERY_STEPS} steps was redone")
        row.problems += order_errors(groups, run.num_steps, _seed(run))


def _seed(run: Run) -> int:
    return int(run.spec().config["seed"])


def _loss_gap(expected: Outcome, found: Outcome) -> float:
    """Largest relative difference of two losses of one step."""
    if len(expected.losses) != len(found.losses):
        return math.inf
    pairs = zip(expected.losses, found.losses, strict=True)
    return max(abs(a - b) / max(abs(a), 1e-9) for a, b in pairs)


def _differences(expected: Outcome, found: Outcome) -> str:
    pairs = zip(expected.losses, found.losses, strict=False)
    first = next((step for step, (a, b) in enumerate(pairs) if a != b), None)
    weights = [name for name, sha in expected.weights.items() if found.weights.get(name) != sha]
    counts = f"{len(found.losses)} losses of {len(expected.losses)}"
    return f"{counts}, first other loss at step {first}, other files {weights}"
