"""`python -m tests.fuzz [--minutes M] [--reader NAME ...] [--seed S]`: good and damaged sources.

Every reader gets sources with known content: exactly that must come out, and of a damaged one rows
and rejects or one error. Ends with 1 if anything else happened; the sources are kept.
"""

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.readers import READERS
from tests.fuzz.watch import Watch


def main(argv: Sequence[str]) -> int:
    """Run the program, and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="time of each reader")
    parser.add_argument("--reader", action="append", choices=list(READERS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="iteration to begin with")
    parser.add_argument("--jobs", type=int, default=2, help="readers at the same time")
    options = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="drorae-fuzz-"))
    waiting = list(options.reader or READERS)
    watches: list[Watch] = []

    def work() -> None:
        while waiting:
            stop_s = time.monotonic() + 60 * options.minutes
            watch = Watch(waiting.pop(0), options.seed, folder, stop_s)
            watches.append(watch)
            watch.run(options.first)

    threads = [threading.Thread(target=work) for _ in range(options.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for watch in watches:
        line = f"{watch.reader:8} | {watch.iterations} sources | {len(watch.failures)} failures"
        sys.stdout.write(line + "\n")
    return 1 if any(watch.failures for watch in watches) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
