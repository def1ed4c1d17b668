"""Training checkpoints: written whole or not at all, checked before use, newest intact one chosen.

A checkpoint is `step-00000500.pt` and, written after it, `step-00000500.json` with its size and
sha256. Without an intact pair there is no checkpoint, so a torn write is never restored. Weights of
finished stages are not here: those are safetensors files in the stage's output.

`save` copies the state to the memory of this process and returns; a thread writes the copy. At most
one write is under way: the next `save` waits for it. A write that fails is tried again, and if it
still fails the training goes on with the older checkpoint and a warning; only the second failure in
a row stops it.
"""

import hashlib
import io
import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from drorae.store import files

__all__ = ["Snapshot", "TrainingCheckpoints", "load_weights", "newest_step", "weights_bytes"]

log = logging.getLogger(__name__)

RETRY_AFTER_S = (2.0, 10.0, 30.0)
"""Waits before a failed write is tried again."""
MAX_FAILED_SAVES = 2
"""Saves that may fail one after the other before training stops."""


class Snapshot:
    """A copy of nested state in the memory of this process, into the same buffers every time.

    Buffers for tensors of a GPU are pinned, so that the copy runs at the full speed of the bus.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def take(self, state: dict[str, Any]) -> dict[str, Any]:
        """Copy all tensors, dicts and lists; valid until the next call."""
        copied = self._copy(state, ())
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the copies do not block one by one
        return copied

    def _copy(self, value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, Tensor):
            return self._buffer(value, path).copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return {key: self._copy(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, (*path, i)) for i, item in enumerate(value))
        return value

    def _buffer(self, value: Tensor, path: tuple[Any, ...]) -> Tensor:
        kept = self._buffers.get(path)
        if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
            kept = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._buffers[path] = kept
        return kept


@dataclass(kw_only=True, slots=True)
class TrainingCheckpoints:
    """Checkpoints of one stage under `<work_uri>/checkpoints`. One process writes.

    Args:
        work_uri: The stage's working folder, local or s3://.
        every_steps: Steps between checkpoints.
        every_s: Seconds after which one is due anyway.
        keep: Number of newest checkpoints kept.
        keep_every_steps: Those at multiples of this are kept too; 0: none.
    """

    work_uri: str
    every_steps: int
    every_s: float
    keep: int
    keep_every_steps: int = 0
    _last_s: float = field(default_factory=time.monotonic, init=False)
    _snapshot: Snapshot = field(default_factory=Snapshot, init=False, repr=False)
    _writing: threading.Thread | None = field(default=None, init=False, repr=False)
    _failed: list[Exception] = field(default_factory=list, init=False, repr=False)

    @property
    def folder(self) -> str:
        """Where the files lie."""
        return files.join(self.work_uri, "checkpoints")

    def due(self, step: int) -> bool:
        """Whether a checkpoint should be written after `step` finished steps, whatever the time."""
        milestone = self.keep_every_steps and step % self.keep_every_steps == 0
        return step % self.every_steps == 0 or bool(milestone)

    def overdue(self) -> bool:
        """Whether `every_s` seconds have passed since the last one."""
        return time.monotonic() - self._last_s >= self.every_s

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copy the state and write it in the background, marker last; old ones are deleted after.

        Raises:
            RuntimeError: The last saves failed.
        """
        self.wait()
        if len(self._failed) >= MAX_FAILED_SAVES:
            raise RuntimeError(
                f"{self.folder}: the last {len(self._failed)} training checkpoints could not be "
                f"written: {self._failed[-1]} Expected a place that can be written; free space or "
                "repair the store, then rerun the stage."
            ) from self._failed[-1]
        copied = self._snapshot.take(state)
        self._writing = threading.Thread(
            target=self._write, args=(step, copied), name="checkpoint", daemon=True
        )
        self._writing.start()
        self._last_s = time.monotonic()

    def wait(self) -> None:
        """Return when no write is under way."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def latest(self) -> dict[str, Any] | None:
        """State of the newest intact checkpoint, on the CPU; None if there is none.

        A damaged one is left out with a warning that names its file.
        """
        self.wait()
        for name in reversed(self._names()):
            state = self._load(name)
            if state is not None:
                return state
        return None

    def _write(self, step: int, state: dict[str, Any]) -> None:
        for wait_s in (*RETRY_AFTER_S, None):
            try:
                self._write_pair(step, state)
            except Exception as error:  # any failure of a store: it decides nothing about training
                log.warning("checkpoint of step %d was not written: %s", step, error)
                if wait_s is None:
                    self._failed.append(error)
                    return
                time.sleep(wait_s)
            else:
                self._failed.clear()
                return

    def _write_pair(self, step: int, state: dict[str, Any]) -> None:
        name = f"step-{step:08d}"
        # A marker of an earlier attempt must not vouch for a file that is being replaced.
        files.delete(files.join(self.folder, f"{name}.json"))
        entry = files.write_with(
            files.join(self.folder, f"{name}.pt"), lambda target: torch.save(state, target)
        )
        marker = {"step": step, "size_bytes": entry.size_bytes, "sha256": entry.sha256}
        files.write_json(files.join(self.folder, f"{name}.json"), marker)
        self._prune(name)

    def _prune(self, newest: str) -> None:
        """Delete what is neither among the newest nor a milestone, and what killed writes left.

        Later ones are damaged: training did not continue from them.
        """
        names = [name for name in self._names() if name <= newest]
        kept = {name for name in names if self._is_milestone(name)} | set(names[-self.keep :])
        for file in sorted(files.list_sizes(self.folder)):  # a marker goes before its file
            if file.rsplit(".", 1)[0] not in kept:
                files.delete(files.join(self.folder, file))

    def _is_milestone(self, name: str) -> bool:
        step = int(name.removeprefix("step-"))
        return self.keep_every_steps > 0 and step % self.keep_every_steps == 0

    def _names(self) -> list[str]:
        names = files.list_files(self.folder)
        return sorted(n.removesuffix(".json") for n in names if n.endswith(".json"))

    def _load(self, name: str) -> dict[str, Any] | None:
        uri = files.join(self.folder, f"{name}.pt")
        try:
            marker = files.read_json(files.join(self.folder, f"{name}.json"))
            size_bytes, sha256 = marker["size_bytes"], marker["sha256"]
            found = files.size(uri)
        except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
            log.warning("checkpoint %s is left out: %r", uri, error)
            return None
        if found != size_bytes:
            log.warning("checkpoint %s is left out: %d bytes of %d", uri, found, size_bytes)
            return None
        data = files.read_bytes(uri)
        if hashlib.sha256(data).hexdigest() != sha256:
            log.warning("checkpoint %s is left out: its content was changed", uri)
            return None
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def newest_step(work_uri: str) -> int:
    """Step of the newest checkpoint of a working folder, intact or not; -1 if there is none."""
    names = files.list_files(files.join(work_uri, "checkpoints"))
    steps = [name.removeprefix("step-").removesuffix(".json") for name in names]
    return max((int(step) for step in steps if step.isdecimal()), default=-1)


def weights_bytes(state: dict[str, Tensor]) -> bytes:
    """A state dict as safetensors, contiguous, on the CPU."""
    from safetensors.torch import save

    return save({name: value.detach().cpu().contiguous() for name, value in state.items()})


def load_weights(path: str) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU."""
    from safetensors.torch import load_file

    return load_file(path)
