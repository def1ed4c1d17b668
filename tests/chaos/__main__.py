"""`python -m tests.chaos [--seed S] [--only NAME ...] [--list]`: break a stage, print a table.

Ends with 1 if a scenario did not end with the right result. The same seed draws the same moments,
as steps of the run; where in a step a signal arrives differs by milliseconds.
"""

import argparse
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Sequence

from drorae.config import Compute
from tests.chaos.bench import Bench
from tests.chaos.product import COMPUTE
from tests.chaos.scenarios import SCENARIOS
from tests.chaos.table import Row, render

QUIET = {"OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


def play(names: Sequence[str], seed: int, hang_timeout_s: float) -> list[Row]:
    """Run scenarios one after the other; a failure of one does not keep the next from running."""
    os.environ.update(QUIET)
    rows: list[Row] = []
    with Bench(hang_timeout_s) as bench:
        for name in names:
            row = Row(scenario=name)
            started_s = time.monotonic()
            try:
                SCENARIOS[name](bench, row, random.Random(f"{seed}/{name}"))
            except Exception as error:
                row.problems.append(f"{type(error).__name__}: {error}")
            bench.end_runs()
            row.wall_s = time.monotonic() - started_s
            if not row.ok:
                bench.discard_cluster()
            _tell(" | ".join(row.cells()) + f" | {row.wall_s:.0f} s")
            rows.append(row)
    return rows


def main(argv: Sequence[str]) -> int:
    """Run the program, and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and victims")
    parser.add_argument("--only", action="append", choices=list(SCENARIOS), metavar="NAME")
    parser.add_argument(
        "--hang-timeout-s",
        type=float,
        default=COMPUTE.hang_timeout_s,
        help=f"compute.hang_timeout_s; the product's default is {Compute().hang_timeout_s:.0f}",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="give scenarios that failed a second try, on whose results the exit code then depends",
    )
    parser.add_argument("--list", action="store_true", help="show the scenarios and end")
    options = parser.parse_args(argv)
    if options.list:
        for name, scenario in SCENARIOS.items():
            _tell(f"{name:14} {(scenario.__doc__ or '').splitlines()[0]}")
        return 0
    logging.basicConfig(level=logging.ERROR)
    # By default SIGTERM ends Python at once, and what was started would go on.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started_s = time.monotonic()
    rows = play(options.only or list(SCENARIOS), options.seed, options.hang_timeout_s)
    failed = [row.scenario for row in rows if not row.ok]
    if failed and options.again:
        _tell(f"\nonce more: {', '.join(failed)}")
        second = play(failed, options.seed, options.hang_timeout_s)
        rows, failed = rows + second, [row.scenario for row in second if not row.ok]
    _tell(f"\n{render(rows)}\n\n{time.monotonic() - started_s:.0f} s, seed {options.seed}")
    return 1 if failed else 0


def _tell(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
