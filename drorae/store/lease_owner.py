"""Who holds a lease: the content of its file, and whether that process still lives."""

import json
import os
import socket
import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from drorae.config import from_json, to_json
from drorae.store.files import encode_json

DEFAULT_TTL_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseOwner:
    """Who holds a lease, as its file says."""

    name: str
    """What the holder calls itself, for messages."""
    host: str
    """Host name, for messages."""
    machine: str
    """Boot and process-number space: only inside one are process numbers comparable."""
    pid: int
    """Process number on that machine."""
    process_started: str
    """Start time of that process, which tells a reused process number."""
    token: str
    """Random text, different for every acquisition."""
    ttl_s: float
    """Seconds without a renewal after which others may take over."""
    acquired_at: str
    """Start of the lease, UTC; for people, never compared."""
    num_renewals: int
    """Raised by every heartbeat, so that the file changes."""

    def __str__(self) -> str:
        return f"{self.name} (host {self.host}, process {self.pid}, since {self.acquired_at})"


def encode_owner(owner: LeaseOwner) -> bytes:
    """Content of a lease file."""
    return encode_json(to_json(owner))


def decode_owner(content: bytes) -> LeaseOwner:
    """Holder that a lease file names; a stand-in if the file is not readable."""
    try:
        return from_json(LeaseOwner, json.loads(content), "lease")
    except ValueError:
        # A half-written file of a dead writer: it runs out like any other.
        return LeaseOwner(
            name="an unreadable lease",
            host="?",
            machine="",
            pid=0,
            process_started="",
            token="",
            ttl_s=DEFAULT_TTL_S,
            acquired_at="?",
            num_renewals=0,
        )


def new_owner(name: str, ttl_s: float) -> LeaseOwner:
    """This process as a holder, with a fresh token."""
    pid = os.getpid()
    return LeaseOwner(
        name=name,
        host=socket.gethostname(),
        machine=_machine(),
        pid=pid,
        process_started=_process_started(pid),
        token=uuid.uuid4().hex,
        ttl_s=float(ttl_s),
        acquired_at=datetime.now(UTC).isoformat(timespec="seconds"),
        num_renewals=0,
    )


def renewed(owner: LeaseOwner) -> LeaseOwner:
    """The same holder one heartbeat later."""
    return replace(owner, num_renewals=owner.num_renewals + 1)


def is_dead(owner: LeaseOwner) -> bool:
    """True if the holder ran on this machine and its process has ended."""
    if not owner.machine or owner.machine != _machine():
        return False
    return _process_started(owner.pid) != owner.process_started


def _machine() -> str:
    """Boot id and process-number namespace; empty outside Linux, where only expiry tells.

    Host names are no identity: containers on the host network share one, with their own processes.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_started(pid: int) -> str:
    """Start time of a process in clock ticks since boot; empty if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # Field 22 of proc(5); the name in field 2 may hold spaces, so count from its closing bracket.
    state, *rest = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else rest[18]
