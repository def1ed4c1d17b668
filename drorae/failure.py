"""How a failure is told, from any process to the user: one exception type, one record.

A rank, a shard task and a stage job each write a `Failure`; who reads it raises it again, repeats
the work, or shows its one line. `is_final` decides between the last two, and is settled here alone:
what is deterministic fails the same way each time, so it ends a group of workers without a restart,
a training without a second run, and a stage without another attempt.
"""

import errno
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Failure", "Fatal", "describe_failure", "failure_as_error", "is_final"]

FINAL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES})
"""System errors that stay until somebody makes room or gives permission."""


class Fatal(RuntimeError):
    """What cannot get better by trying again: the configuration, data or code has to change.

    A mistake that has a class in Python, such as ValueError, needs no `Fatal`: it counts as one.
    """


FINAL_CLASSES = (Fatal, ValueError, FileNotFoundError, ImportError)
RAISED_AGAIN = {kind.__name__: kind for kind in (ValueError, FileNotFoundError, ImportError)}
"""Classes that a user's mistake keeps on its way; others become `Fatal` or RuntimeError."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a piece of work failed: one line for people, and whether to try again."""

    type: str
    """Class of the exception, or another single word where there was none."""
    message: str
    """Its message, on one line."""
    is_final: bool
    """Trying again cannot help: the configuration, the data or the machine has to change first."""
    stage: str = ""
    """Name of the stage."""
    rank: int | None = None
    """Rank of a group of training workers."""
    task: str = ""
    """Name of a shard task."""
    errno: int | None = None
    """Number of the system error among its causes."""
    trace: str = ""
    """Trace of a rank or task, whose log may lie on another machine."""

    def __str__(self) -> str:
        rank = "" if self.rank is None else f"rank {self.rank}"
        task = f"shard {self.task}" if self.task else ""
        where = ", ".join(part for part in (self.stage, rank, task) if part)
        return f"{where}: {self.message}" if where else self.message


def is_final(error: BaseException) -> bool:
    """Whether an exception would come again, looking through the wrappers of Ray."""
    root = _root_cause(error)
    return isinstance(root, FINAL_CLASSES) or _errno(root) in FINAL_ERRNOS


def describe_failure(
    error: BaseException, *, stage: str = "", rank: int | None = None, task: str = ""
) -> Failure:
    """The record of an exception, of its root cause if Ray wrapped it.

    Args:
        error: The exception.
        stage: Stage that it ended.
        rank: Rank that raised it.
        task: Shard task that raised it.
    """
    root = _root_cause(error)
    return Failure(
        type=type(root).__name__,
        message=" ".join(str(root).split()) or type(root).__name__,
        is_final=is_final(root),
        stage=stage,
        rank=rank,
        task=task,
        errno=_errno(root),
        trace="" if rank is None and not task else "".join(traceback.format_exception(root)),
    )


def failure_as_error(failure: Failure) -> Exception:
    """The exception that a recorded failure is raised as.

    A user's mistake keeps its class and words; anything else says where it happened.
    """
    kind = RAISED_AGAIN.get(failure.type) if failure.is_final else None
    if kind is not None and not failure.task:
        error: Exception = kind(failure.message)
    else:
        error = (kind or (Fatal if failure.is_final else RuntimeError))(str(failure))
    if failure.errno is not None:
        error.__cause__ = OSError(failure.errno, os.strerror(failure.errno))
    if failure.trace:
        error.add_note(failure.trace)
    return error


def _root_cause(error: BaseException) -> BaseException:
    """Follow Ray's wrappers to the exception that our own code raised."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        failures = getattr(error, "worker_failures", None)
        inner = next(iter(failures.values()), None) if isinstance(failures, dict) else None
        inner = inner or getattr(error, "cause", None)
        if isinstance(inner, BaseException):
            error = inner
    return error


def _errno(error: BaseException) -> int | None:
    """Number of the last system error among the causes; a final one goes first."""
    numbers = [cause.errno for cause in _causes(error) if isinstance(cause, OSError)]
    numbers = [number for number in numbers if number is not None]
    final = [number for number in numbers if number in FINAL_ERRNOS]
    return next(iter(final or numbers), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()  # `raise error from error` makes a circle
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__
