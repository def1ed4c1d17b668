"""One writer at a time: a lease file with heartbeat, on a file system or on S3.

The holder rewrites the file every third of its time to live. A waiter takes over when it saw no
change for that long on its own clock (clocks of hosts are never compared), or at once when the
holder ran on this machine and its process is gone. Every change is a compare-and-swap, so of many
waiters one wins, and a holder that was overtaken notices and must not commit. A store that is away
is away for the waiters too: the holder keeps its lease until the store says otherwise, or until
other requests would have given up as well.
"""

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from drorae.store import files, patience, versioned
from drorae.store.lease_owner import (
    DEFAULT_TTL_S,
    LeaseOwner,
    decode_owner,
    encode_owner,
    is_dead,
    new_owner,
    renewed,
)

log = logging.getLogger(__name__)

RENEWALS_PER_TTL = 3
REPEAT_WAIT_NOTICE_S = 30.0


class Lease:
    """A held lease; a context manager that releases it at the end.

    Args:
        uri: The lease file.
        owner: Its present content.
        version: Its present version.
    """

    def __init__(self, uri: str, owner: LeaseOwner, version: str):
        self.uri = uri
        self.owner = owner
        self._version = version
        self._lost_because = ""
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._renewed_s = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def renew(self) -> None:
        """Renew now; call it directly before what only the holder may do.

        Raises:
            RuntimeError: If another writer took the lease, or the store did not answer for too
                long.
        """
        with self._lock:
            if not self._lost_because:
                self._renew()
        self.check()

    def check(self) -> None:
        """Raise RuntimeError if the lease is lost; no access to the store."""
        if self._lost_because:
            raise RuntimeError(
                f"lease {self.uri} is lost: {self._lost_because}. Expected to be the only writer "
                f"of "
                f"this output; run the stage again, it reuses what the other writer commits."
            )

    def release(self) -> None:
        """Stop the heartbeat and free the lease for others at once."""
        self._stop.set()
        self._thread.join()
        if self._lost_because:
            return
        try:
            versioned.delete_if_version(self.uri, self._version)
        except RuntimeError as error:
            log.warning("lease %s was not deleted and runs out by itself: %s", self.uri, error)

    def _beat(self) -> None:
        while not self._stop.wait(self.owner.ttl_s / RENEWALS_PER_TTL) and not self._lost_because:
            with self._lock:
                try:
                    with patience.patience(0):  # the next beat is soon, and `renew` wants the lock
                        self._renew()
                except RuntimeError as error:
                    self._give_up_when_late(error)

    def _renew(self) -> None:
        # The waiters' clock starts when the new content appears, which is after this moment.
        started_s = time.monotonic()
        owner = renewed(self.owner)
        version = _swap(self.uri, owner, self._version)
        if version is None:
            self._lost_because = (
                f"it was taken over by {read_owner(self.uri) or 'nobody (deleted)'}"
            )
            log.error("lease %s: %s", self.uri, self._lost_because)
            return
        self.owner, self._version, self._renewed_s = owner, version, started_s

    def _give_up_when_late(self, error: RuntimeError) -> None:
        late_s = time.monotonic() - self._renewed_s
        log.warning("lease %s was not renewed for %.0f s: %s", self.uri, late_s, error)
        if late_s > self.owner.ttl_s + patience.PATIENCE_S:
            self._lost_because = f"it could not be renewed for {late_s:.0f} s ({error})"


def acquire(
    uri: str,
    owner: str,
    ttl_s: float = DEFAULT_TTL_S,
    *,
    until: Callable[[], bool] = lambda: False,
    on_wait: Callable[[LeaseOwner], None] | None = None,
    poll_s: float = 1.0,
) -> Lease | None:
    """Take the lease, waiting while another writer holds it.

    Args:
        uri: The lease file; local path or s3:// address.
        owner: What this holder is called in messages.
        ttl_s: Seconds without a renewal after which others may take over.
        until: Asked before each wait; True ends the waiting without a lease.
        on_wait: Told who holds the lease, once at first and then every half a minute.
        poll_s: Seconds between two looks.

    Returns:
        The lease, or None if `until` said True first.

    Raises:
        RuntimeError: If the store cannot be used.
    """
    if ttl_s <= 0:
        raise ValueError(f"ttl_s={ttl_s} is out of range: expected a positive number of seconds.")
    watch = _Watch()
    while True:
        lease = _try_acquire(uri, new_owner(owner, ttl_s), watch)
        if lease is not None:
            return lease
        if until():
            return None
        watch.notify(on_wait)
        time.sleep(poll_s)


def read_owner(uri: str) -> LeaseOwner | None:
    """Who holds a lease now; None if nobody does."""
    try:
        return decode_owner(versioned.read_versioned(uri)[0])
    except FileNotFoundError:
        return None


class _Watch:
    """What a waiter saw: the holder, and since when its file has not changed."""

    def __init__(self) -> None:
        self.owner: LeaseOwner | None = None
        self.version = ""
        self._since_s = 0.0
        self._notified_s = -REPEAT_WAIT_NOTICE_S

    def see(self, owner: LeaseOwner, version: str) -> None:
        if version != self.version:
            self.owner, self.version, self._since_s = owner, version, time.monotonic()

    def is_expired(self) -> bool:
        assert self.owner is not None
        still_s = time.monotonic() - self._since_s
        return still_s > self.owner.ttl_s or is_dead(self.owner)

    def notify(self, on_wait: Callable[[LeaseOwner], None] | None) -> None:
        now_s = time.monotonic()
        if on_wait and self.owner and now_s - self._notified_s >= REPEAT_WAIT_NOTICE_S:
            self._notified_s = now_s
            on_wait(self.owner)


def _try_acquire(uri: str, mine: LeaseOwner, watch: _Watch) -> Lease | None:
    try:
        content, version = versioned.read_versioned(uri)
    except FileNotFoundError:
        files.create_exclusive(uri, encode_owner(mine))
        made = _version_if_mine(uri, mine)
        return Lease(uri, mine, made) if made else None
    watch.see(decode_owner(content), version)
    if not watch.is_expired():
        return None
    log.warning("lease %s of %s ran out: taking it over", uri, watch.owner)
    taken = _swap(uri, mine, version)
    return Lease(uri, mine, taken) if taken else None


def _swap(uri: str, owner: LeaseOwner, version: str) -> str | None:
    versioned.write_if_version(uri, encode_owner(owner), version)
    return _version_if_mine(uri, owner)


def _version_if_mine(uri: str, mine: LeaseOwner) -> str | None:
    """Version of the file if it holds exactly `mine`.

    The content decides, not the reply to the write: a request that was repeated after a lost answer
    reports a conflict with our own file.
    """
    try:
        content, version = versioned.read_versioned(uri)
    except FileNotFoundError:
        return None
    return version if decode_owner(content) == mine else None
