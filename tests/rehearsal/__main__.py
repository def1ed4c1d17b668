"""`python -m tests.rehearsal [--only NAME ...] [--quick]`: the data plane at ImageNet's shape.

A table of what was measured, against bounds; ends with 1 if a line fails.
"""

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence

from tests.rehearsal import latents, rerun, shards
from tests.rehearsal.bench import QUICK, Bench, Sizes
from tests.rehearsal.line import Line, render

CHECKS = {**latents.CHECKS, **shards.CHECKS, **rerun.CHECKS}
QUIET = {"OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1"}


def rehearse(names: Sequence[str], sizes: Sizes, seed: int) -> tuple[list[Line], list[str]]:
    """Run checks one after the other.

    Returns:
        What they measured, and the errors of those that could not.
    """
    lines: list[Line] = []
    errors: list[str] = []
    with Bench(sizes, seed) as bench:
        for name in names:
            started_s = time.monotonic()
            try:
                for line in CHECKS[name](bench):
                    _print(" | ".join(line.cells()))
                    lines.append(line)
            except Exception as error:
                errors.append(f"{name}: {type(error).__name__}: {error}")
            _print(f"{name}: {time.monotonic() - started_s:.0f} s")
    return lines, errors


def main(argv: Sequence[str]) -> int:
    """Run the program, and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.rehearsal", description=__doc__)
    parser.add_argument("--only", action="append", choices=list(CHECKS), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="less of everything: a minute")
    parser.add_argument("--seed", type=int, default=0, help="seed of contents and orders")
    parser.add_argument("--list", action="store_true", help="show the checks and end")
    options = parser.parse_args(argv)
    if options.list:
        for name, check in CHECKS.items():
            _print(f"{name:10} {(check.__doc__ or '').splitlines()[0]}")
        return 0
    logging.basicConfig(level=logging.ERROR)
    # By default SIGTERM ends Python at once, and the S3 server would go on.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.environ.update(QUIET)
    sizes = QUICK if options.quick else Sizes()
    lines, errors = rehearse(options.only or list(CHECKS), sizes, options.seed)
    _print(f"\n{render(lines)}\n" + "".join(f"\n{error}" for error in errors))
    return 0 if not errors and all(line.ok for line in lines) else 1


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
