"""Compare our networks and sampler with tensors that the RAE reference computed.

    python -m drorae.parity DIR

DIR holds configurations, weights, inputs and expected outputs of any sizes (layout:
tests/golden/README.md; weights may be `.pt` files as well). One line a check: `name max_abs_err
tolerance ok|FAIL reason`. A check whose files or expected tensor are absent is skipped, with a
line; one that cannot be computed fails, with the reason. Unknown keys of a configuration are named
in a line and change nothing: the tensors decide. Everything runs on the CPU in float32, as the
reference did. Exit status: 0 all ok, 1 a failure, 2 nothing could be checked.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from drorae.parity.decoding import DecoderPart
from drorae.parity.diffusion import DiffusionPart
from drorae.parity.folder import Outcome, run_checks

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks, print a line each; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m drorae.parity",
        description="Compare our networks and sampler with tensors of the RAE reference.",
    )
    parser.add_argument("folder", type=Path, help="laid out as tests/golden/README.md says")
    folder: Path = parser.parse_args(arguments).folder
    if not folder.is_dir():
        return _nothing(f"{folder} is no folder: expected one laid out like tests/golden.")
    outcomes: list[Outcome] = []
    for part in (DiffusionPart(folder), DecoderPart(folder)):
        for outcome in run_checks(part):
            outcomes.append(outcome)
            sys.stdout.write(outcome.line() + "\n")
            sys.stdout.flush()
    done = {outcome.status for outcome in outcomes} - {"skipped"}
    if not done:
        files = f"{DiffusionPart.io_file} or {DecoderPart.io_file}"
        return _nothing(f"{folder} allows no check: expected {files} and the files beside them.")
    return 1 if "FAIL" in done else 0


def _nothing(message: str) -> int:
    sys.stderr.write(f"drorae.parity: {message}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
