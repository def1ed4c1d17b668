"""Which errors of MLflow are worth another attempt, and how long to ask."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_S = (0.5, 15.0)
"""First and longest pause between two attempts."""

OPEN_PATIENCE_S = 75.0
"""How long a run's opening waits. A server that is restarted takes 16 to 32 s (measured
2026-11-21)."""

_PERMANENT = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "PERMISSION_DENIED",
    "RESOURCE_DOES_NOT_EXIST",
    "UNAUTHENTICATED",
}


def is_permanent(error: Exception) -> bool:
    """Whether repeating cannot cure the error."""
    code = getattr(error, "error_code", "")
    is_caller_error = isinstance(error, TypeError | ValueError | FileNotFoundError | ImportError)
    return code in _PERMANENT or is_caller_error


def asked_again(uri: str, call: Callable[[], T]) -> T:
    """Result of a call that is repeated while the server is away or the database is locked.

    Raises:
        RuntimeError: If that takes longer than `OPEN_PATIENCE_S`.
    """
    pause_s, deadline_s = RETRY_S[0], time.monotonic() + OPEN_PATIENCE_S
    while True:
        try:
            return call()
        except Exception as error:
            if is_permanent(error):
                raise
            if time.monotonic() + pause_s > deadline_s:
                raise RuntimeError(
                    f"MLflow at {uri} did not answer for {OPEN_PATIENCE_S:.0f} s ({error}): "
                    f"expected a running server or a writable SQLite file; start it or correct "
                    f"the tracking address."
                ) from error
            if pause_s == RETRY_S[0]:
                log.warning("MLflow %s did not answer, asking again: %s", uri, error)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, RETRY_S[1])
