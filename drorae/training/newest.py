"""Calls that must not hold up a loop: made by a thread, the newest arguments only."""

import logging
import threading
from collections.abc import Callable

__all__ = ["Newest"]

log = logging.getLogger(__name__)


class Newest:
    """Hands what it is called with to a function in another thread, at most one call at a time.

    What comes while a call runs replaces what has not been handed on yet, so a slow function (a
    store that is away) delays neither the caller nor grows a queue. `close` hands the last one on.

    Args:
        call: The slow function. An error in it is logged and ends nothing.
    """

    def __init__(self, call: Callable[..., object]) -> None:
        self._call = call
        self._changed = threading.Condition()
        self._waiting: tuple[object, ...] | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="newest", daemon=True)
        self._thread.start()

    def __call__(self, *arguments: object) -> None:
        """Note the arguments; returns at once."""
        with self._changed:
            self._waiting = arguments
            self._changed.notify()

    def close(self) -> None:
        """Wait until the last arguments are handed on."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                arguments, self._waiting = self._waiting, None
            if arguments is None:
                return
            try:
                self._call(*arguments)
            except Exception:
                log.exception("a report in the background failed; the loop goes on")
