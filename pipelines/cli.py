"""The `drorae` command: from the options to an exit code.

Heavy modules (Prefect, torch) are imported by the command that needs them.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from rich.console import Console

from drorae.store.manifest import DamagedOutput
from pipelines.parser import build_parser
from pipelines.plan import Request

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def request_of(options: argparse.Namespace) -> Request:
    """Return what the options of `run`, `plan` and the model commands ask for."""
    return Request(
        recipe=options.recipe,
        overrides=tuple(options.overrides),
        workspace=options.workspace,
        only=getattr(options, "only", None),
        from_stage=getattr(options, "from_stage", None),
        force=tuple(getattr(options, "force", ())),
        strict_code=getattr(options, "strict_code", False),
    )


def _configure_logging(level: int) -> None:
    logging.basicConfig(level=level, format="drorae: %(message)s")
    # Libraries set levels of their own loggers, which the root's level does not limit.
    for handler in logging.getLogger().handlers:
        handler.setLevel(level)
        if level > logging.INFO:
            # A failed stage is one line of ours; Prefect would tell it three times.
            handler.addFilter(lambda record: not record.name.startswith("prefect"))
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    options = build_parser().parse_args(argv)
    _configure_logging(logging.INFO if options.verbose else logging.WARNING)
    if hasattr(options, "recipe"):
        options.request = request_of(options) if hasattr(options, "workspace") else None
    try:
        return options.run(options, Console())
    except (ValueError, FileNotFoundError, DamagedOutput, RuntimeError, OSError) as error:
        if options.verbose:
            logging.getLogger(__name__).exception("the command failed")
        message = " ".join(str(error).split()) or type(error).__name__
        Console(stderr=True).print(
            f"drorae: error: {message}", highlight=False, markup=False, soft_wrap=True
        )
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
