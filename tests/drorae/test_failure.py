"""What of an exception reaches the user, and what is tried again."""

import errno

import pytest

from drorae.config import from_json, to_json
from drorae.failure import Failure, Fatal, describe_failure, failure_as_error, is_final


class Wrapped(RuntimeError):
    def __init__(self, cause: Exception):
        super().__init__("wrapper")
        self.cause = cause


class Group(RuntimeError):
    def __init__(self, failures: dict[int, Exception]):
        super().__init__("group")
        self.worker_failures = failures


@pytest.mark.parametrize(
    ("error", "message", "final"),
    [
        (ValueError("bad\nvalue"), "bad value", True),
        (FileNotFoundError("no file"), "no file", True),
        (RuntimeError("later"), "later", False),
        (OSError(errno.ENOSPC, "No space left"), "[Errno 28] No space left", True),
        (OSError(errno.EIO, "bad disk"), "[Errno 5] bad disk", False),
        (Wrapped(ValueError("inside")), "inside", True),
        (Group({0: Wrapped(ValueError("deep"))}), "deep", True),
        (Fatal("loss is not finite"), "loss is not finite", True),
        (ImportError("no module"), "no module", True),
        (KeyboardInterrupt(), "KeyboardInterrupt", False),
    ],
)
def test_errors_become_one_line(error: BaseException, message: str, final: bool) -> None:
    described = describe_failure(error, stage="fusion")
    assert described.message == message
    assert described.is_final is is_final(error) is final


def test_a_full_disk_behind_another_error_is_the_users() -> None:
    error = RuntimeError("write failed")
    error.__cause__ = OSError(errno.ENOSPC, "No space left")
    assert describe_failure(error, stage="fusion").is_final


def again(error: Exception, **place: object) -> Exception:
    """As another process raises it, from the record as JSON."""
    return failure_as_error(from_json(Failure, to_json(describe_failure(error, **place))))


class Narrow(ValueError):
    """A class that the reader of a record does not know."""


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ValueError("bad"), ValueError, "bad"),
        (FileNotFoundError("no file"), FileNotFoundError, "no file"),
        (ImportError("no module"), ImportError, "no module"),
        (Fatal("not finite"), Fatal, "fusion, rank 1: not finite"),
        (Narrow("odd"), Fatal, "fusion, rank 1: odd"),
        (KeyError("later"), RuntimeError, "fusion, rank 1: 'later'"),
    ],
)
def test_a_users_mistake_keeps_its_class_and_others_say_where(error, kind, text) -> None:
    raised = again(error, stage="fusion", rank=1)
    assert type(raised) is kind
    assert str(raised) == text
    assert is_final(raised) is is_final(error)
    assert type(error).__name__ in "".join(raised.__notes__)


def test_a_task_is_named_whatever_the_class() -> None:
    raised = again(ValueError("bad"), task="part-4")
    assert type(raised) is ValueError
    assert str(raised) == "shard part-4: bad"


def test_a_full_disk_is_still_final_after_its_way_through_a_record() -> None:
    error = RuntimeError("no space left for /x")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    raised = again(error, stage="fusion", rank=0)
    assert is_final(raised)
    assert isinstance(raised.__cause__, OSError)
    assert raised.__cause__.errno == errno.ENOSPC


def test_an_error_that_is_its_own_cause_ends() -> None:
    error = ValueError("bad")
    error.__cause__ = error
    assert describe_failure(error).message == "bad"
