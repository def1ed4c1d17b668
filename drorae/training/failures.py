"""Which rank failed first, and with what: what the driver tells when a group of workers is lost.

The first exception of the group is a file that only one rank can create, written before that rank
lets go of the others, so every later error is a consequence of it. A rank that is killed writes
nothing; then the survivors' broken connections are all that is left, and the rank that Ray lost, or
that fell silent first, is named.
"""

import logging
import time
from collections.abc import Iterable
from dataclasses import replace

from torch import distributed as dist

from drorae.config import from_json, to_json
from drorae.failure import Failure, describe_failure, failure_as_error
from drorae.store import files
from drorae.training.watchdog import RankReport, read_reports

__all__ = [
    "describe",
    "first_failure",
    "forget_group",
    "record_error",
    "record_hang",
    "start_group",
]

LOSS_GRACE_S = 3.0
"""How long a rank that lost a connection waits before it says so: a process that was killed is
known to Ray within a second, and it is the cause."""

LOSS_TEXTS = ("gloo/transport", "connection closed by peer", "connection reset by peer", "nccl")

LOST_OTHERS = "LostOthers"
"""Type of a failure that only says that other ranks went away."""

log = logging.getLogger(__name__)


def start_group(ranks_uri: str, group: str, rank: int, world_size: int) -> str:
    """Folder of a group of workers that starts now; rank 0 makes it the present one."""
    folder_uri = files.join(ranks_uri, group)
    if rank == 0:
        present = {"group": group, "world_size": world_size}
        files.write_json(files.join(ranks_uri, "group.json"), present)
    return folder_uri


def forget_group(ranks_uri: str) -> None:
    """Forget the present group: what ends a run before its group starts is not an older error."""
    files.delete(files.join(ranks_uri, "group.json"))


def record_error(folder_uri: str, rank: int, error: Exception) -> None:
    """Keep an exception of this rank if it is the first of the group; never raises."""
    failure = describe_failure(error, rank=rank)
    if _lost_others(error):
        time.sleep(LOSS_GRACE_S)
        failure = replace(failure, type=LOST_OTHERS)
    _record(folder_uri, failure)


def record_hang(folder_uri: str, rank: int, message: str) -> None:
    """Keep what a watchdog found, if it is the first error of the group; never raises."""
    _record(folder_uri, Failure(rank=rank, type="Hang", message=message, is_final=False))


def _record(folder_uri: str, failure: Failure) -> None:
    try:
        content = files.encode_json(to_json(failure))
        files.create_exclusive(files.join(folder_uri, "first_error.json"), content)
    except Exception as error:  # a full disk or an absent store must not hide the first error
        log.error("the error of rank %s was not recorded: %s", failure.rank, error)


def first_failure(ranks_uri: str) -> tuple[Failure | None, dict[int, RankReport]]:
    """The first error of the present group, if a rank told one, and what its ranks last reported.

    A store that is away tells nothing.
    """
    try:
        present = files.read_json(files.join(ranks_uri, "group.json"))
        folder_uri = files.join(ranks_uri, present["group"])
        reports = read_reports(folder_uri, present["world_size"])
        uri = files.join(folder_uri, "first_error.json")
        failure = from_json(Failure, files.read_json(uri)) if files.exists(uri) else None
    except (FileNotFoundError, RuntimeError) as error:
        log.warning("the ranks left no account: %s", error)
        return None, {}
    return failure, reports


def describe(
    stage: str,
    failure: Failure | None,
    reports: dict[int, RankReport],
    vanished: Iterable[int],
    error: Exception,
) -> Exception:
    """The error of a lost group, as the stage raises it.

    Args:
        stage: Name of the stage.
        failure: First error that a rank told.
        reports: What the ranks last reported.
        vanished: Ranks whose process Ray lost.
        error: What Ray raised.
    """
    if failure is not None and failure.type != LOST_OTHERS:
        return failure_as_error(replace(failure, stage=stage))
    lost = sorted(vanished) or _silent_first(failure, reports)
    if lost:
        names = ", ".join(str(reports.get(rank, f"rank {rank}")) for rank in lost)
        return RuntimeError(
            f"{stage}: {names} vanished without an exception of its own: expected it to run on. "
            "It was killed (out of memory?) or its machine is gone; see the logs of that machine, "
            "then run again: the stage continues from its last checkpoint."
        )
    return RuntimeError(f"{stage}: training stopped without an error of its own: {error}")


def _silent_first(failure: Failure | None, reports: dict[int, RankReport]) -> list[int]:
    """Of the ranks other than the one that complained, those with the fewest reports."""
    if failure is None:
        return []
    others = {rank: r.number for rank, r in reports.items() if rank != failure.rank}
    return [rank for rank, number in others.items() if number == min(others.values())]


def _lost_others(error: Exception) -> bool:
    text = str(error).lower()
    is_distributed = isinstance(error, dist.DistError) or type(error) is RuntimeError
    return is_distributed and any(words in text for words in LOSS_TEXTS)
