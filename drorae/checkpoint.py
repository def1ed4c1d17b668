"""Training checkpoints: written whole or not at all, checked before use, newest intact one chosen.

Every rank calls `save` and `restore`. `save` copies what this rank keeps to the memory of its
process and returns; a thread writes the copy. When all ranks have written, rank 0 writes the marker
(`checkpoint_format`): without one there is no checkpoint, so a torn write is never restored. The
threads agree over a process group of their own, and so meet no collective of the loop. At most one
write is under way: the next `save` waits for it. A write that fails is tried again, and if it still
fails on any rank the training goes on with the older checkpoint and a warning; only the second
failure in a row stops it.

`restore` reads what this rank needs into the same memory, and changes a tensor only when all ranks
have found their files intact. Nothing is gathered on one host. Weights of finished stages are not
here: those are safetensors files in the stage's output.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from drorae.checkpoint_format import (
    Damaged,
    Layout,
    Marker,
    check_tensors,
    plan_layout,
    read_marker,
    read_parts,
    read_small,
    write_part,
)
from drorae.checkpoint_ranks import Ranks, local_part
from drorae.failure import Failure, describe_failure, failure_as_error
from drorae.store import files
from drorae.store.files import FileEntry
from drorae.store.patience import PATIENCE_S

__all__ = ["Snapshot", "TrainingCheckpoints", "load_weights", "newest_step", "weights_bytes"]

T = TypeVar("T")

log = logging.getLogger(__name__)

RETRY_AFTER_S = (2.0, 10.0, 30.0)
"""Waits before a failed write is tried again."""
REQUESTS_OF_A_TRY = 4
"""Requests of one try that may each wait for an absent store: before, of, and after the files."""
LONGEST_OUTAGES_S = (1 + len(RETRY_AFTER_S)) * REQUESTS_OF_A_TRY * PATIENCE_S + sum(RETRY_AFTER_S)
"""What absent stores may cost a rank in one save: 4 tries * 4 requests * 90 s + 42 s = 1482 s; the
usual case, one outage in each try, costs 402 s. A group of gloo that timed out once is of no use
any more, so that ranks wait for each other so much longer than otherwise."""
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

    def spaces(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The buffers that `take` would copy these tensors into, with any content."""
        return {name: self._buffer(value, (name,)) for name, value in tensors.items()}

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
    """Checkpoints of one stage under `<work_uri>/checkpoints`. Every rank has one.

    Args:
        work_uri: The stage's working folder, local or s3://.
        every_steps: Steps between checkpoints.
        every_s: Seconds after which one is due anyway.
        keep: Number of newest checkpoints kept.
        keep_every_steps: Those at multiples of this are kept too; 0: none.
        timeout_s: How long ranks wait for each other, outages of the store (`LONGEST_OUTAGES_S`)
            aside. A rank that dies is noticed at once.
    """

    work_uri: str
    every_steps: int
    every_s: float
    keep: int
    keep_every_steps: int = 0
    timeout_s: float = 600.0
    _last_s: float = field(default_factory=time.monotonic, init=False)
    _tensors: Snapshot = field(default_factory=Snapshot, init=False, repr=False)
    _small: Snapshot = field(default_factory=Snapshot, init=False, repr=False)
    _layout: Layout | None = field(default=None, init=False, repr=False)
    _ranks: Ranks | None = field(default=None, init=False, repr=False)
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

    def save(self, step: int, tensors: Mapping[str, Tensor], small: dict[str, Any]) -> None:
        """Copy the state and write it in the background, marker last; old ones are deleted after.

        Args:
            step: Finished steps.
            tensors: The same names on every rank: shards (DTensor), or whole tensors that all
                ranks hold alike, which are spread over their files.
            small: Further state; that of rank 0 counts.

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
        layout, ranks = self._layout_of(tensors), self._connected()
        mine = {chunk.name: local_part(tensors[chunk.name]) for chunk in layout.of_rank(ranks.rank)}
        copied = self._tensors.take(mine)
        small = self._small.take(small) if ranks.rank == 0 else {}
        self._writing = threading.Thread(
            target=self._write,
            args=(step, layout, ranks, copied, small),
            name="checkpoint",
            daemon=True,
        )
        self._writing.start()
        self._last_s = time.monotonic()

    def wait(self) -> None:
        """Return when no write of this rank is under way."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def restore(self, tensors: Callable[[], Mapping[str, Tensor]]) -> dict[str, Any] | None:
        """Fill tensors with those of the newest intact checkpoint (a collective).

        A damaged one is left out with a warning that names its file.

        Args:
            tensors: Gives the tensors to fill, as for `save`; called if there is a checkpoint.

        Returns:
            The small state, on every rank; None, and no tensor changed, without a checkpoint.

        Raises:
            Fatal: A checkpoint of another format or of other tensors.
        """
        self.wait()
        ranks = self._connected()
        for name in reversed(ranks.from_main(self._names)):
            problem, marker = ranks.from_main(partial(self._marker, name))
            if marker is not None:
                problem, small = self._restore(name, marker, tensors())
                if problem is None:
                    return small
            if ranks.rank == 0:
                log.warning("checkpoint %s", problem)
        return None

    def _restore(
        self, name: str, marker: Marker, tensors: Mapping[str, Tensor]
    ) -> tuple[str | None, dict[str, Any]]:
        """The first problem of any rank, or None and the small state."""
        ranks, layout, uri = self._connected(), self._layout_of(tensors), self._uri(name)
        check_tensors(uri, marker, layout)
        mine = {chunk.name: tensors[chunk.name] for chunk in layout.of_rank(ranks.rank)}
        spaces = self._tensors.spaces({k: local_part(v) for k, v in mine.items()})
        small, problem = {}, None
        try:
            read_parts(uri, marker, mine, spaces)
            small = read_small(f"{uri}.pt", marker) if ranks.rank == 0 else {}
        except Damaged as damaged:
            problem = str(damaged)
        problems = [text for text in ranks.exchange(problem) if text]
        if problems:
            return problems[0], {}
        owners = layout.owners()
        for tensor_name, tensor in tensors.items():
            ranks.put(tensor, spaces.get(tensor_name), owners[tensor_name])
        return None, ranks.from_main(lambda: small)

    def _connected(self) -> Ranks:
        if self._ranks is None:
            self._ranks = Ranks(self.timeout_s + LONGEST_OUTAGES_S)
        return self._ranks

    def _layout_of(self, tensors: Mapping[str, Tensor]) -> Layout:
        """Shapes and shards of a run do not change: planned once."""
        if self._layout is None:
            self._layout = plan_layout(tensors, self._connected().exchange)
        return self._layout

    def _write(
        self,
        step: int,
        layout: Layout,
        ranks: Ranks,
        tensors: dict[str, Tensor],
        small: dict[str, Any],
    ) -> None:
        """Body of the thread. All ranks come to the same end, at the same time.

        No rank begins the next checkpoint while rank 0 deletes what belongs to none.
        """
        try:
            write = partial(self._write_files, step, layout, ranks, tensors, small)
            written = ranks.exchange(_tried(step, ranks.rank, write))
            if not (failures := [found for found in written if isinstance(found, Failure)]):
                entries = [entry for found in written for entry in cast(list[FileEntry], found)]
                conclude = partial(self._conclude, step, layout, entries)
                concluded = ranks.from_main(lambda: _tried(step, 0, conclude))
                failures = [concluded] if isinstance(concluded, Failure) else []
        except Exception as error:  # ranks that went away
            log.warning("checkpoint of step %d was not written: %s", step, error)
            failures = [describe_failure(error, rank=ranks.rank)]
        if failures:
            self._failed.append(failure_as_error(failures[0]))
        else:
            self._failed.clear()

    def _write_files(
        self,
        step: int,
        layout: Layout,
        ranks: Ranks,
        tensors: dict[str, Tensor],
        small: dict[str, Any],
    ) -> list[FileEntry]:
        uri = self._uri(_name(step))
        if ranks.rank == 0:
            # A marker of an earlier attempt must not vouch for files that are being replaced.
            files.delete(f"{uri}.json")
        entries = [write_part(f"{uri}.{ranks.rank}.bin", layout.of_rank(ranks.rank), tensors)]
        if ranks.rank == 0:
            entries.append(files.write_with(f"{uri}.pt", lambda target: torch.save(small, target)))
        return entries

    def _conclude(self, step: int, layout: Layout, entries: list[FileEntry]) -> None:
        name = _name(step)
        entry = files.write_bytes(f"{self._uri(name)}.json", layout.marker(step, entries))
        self._prune(name, {entry.name, *(other.name for other in entries)})

    def _prune(self, newest: str, files_of_newest: set[str]) -> None:
        """Delete what is neither among the newest nor a milestone, and what killed writes left.

        Later ones are damaged: training did not continue from them.
        """
        names = [name for name in self._names() if name <= newest]
        kept = {name for name in names if self._is_milestone(name)} | set(names[-self.keep :])
        present = files.list_sizes(self.folder)
        # A marker goes before its files.
        for file in sorted(present, key=lambda file: not file.endswith(".json")):
            name = file.split(".", 1)[0]
            if name not in kept or (name == newest and file not in files_of_newest):
                files.delete(files.join(self.folder, file))

    def _is_milestone(self, name: str) -> bool:
        step = int(name.removeprefix("step-"))
        return self.keep_every_steps > 0 and step % self.keep_every_steps == 0

    def _names(self) -> list[str]:
        names = files.list_files(self.folder)
        return sorted(n.removesuffix(".json") for n in names if n.endswith(".json"))

    def _uri(self, name: str) -> str:
        return files.join(self.folder, name)

    def _marker(self, name: str) -> tuple[str | None, Marker | None]:
        try:
            return None, read_marker(f"{self._uri(name)}.json")
        except Damaged as damaged:
            return str(damaged), None


def newest_step(work_uri: str) -> int:
    """Step of the newest checkpoint of a working folder, intact or not; -1 if there is none."""
    names = files.list_files(files.join(work_uri, "checkpoints"))
    steps = [name.removeprefix("step-").removesuffix(".json") for name in names]
    return max((int(step) for step in steps if step.isdecimal()), default=-1)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _tried(step: int, rank: int, write: Callable[[], T]) -> T | Failure:
    """What `write` returns, tried again after its failures; the last one if all fail."""
    for wait_s in (*RETRY_AFTER_S, None):
        try:
            return write()
        except Exception as error:  # any failure of a store: it decides nothing about training
            log.warning("checkpoint of step %d was not written: %s", step, error)
            if wait_s is None:
                return describe_failure(error, rank=rank)
            time.sleep(wait_s)
    raise AssertionError("the last try returns")


def weights_bytes(state: dict[str, Tensor]) -> bytes:
    """A state dict as safetensors, contiguous, on the CPU."""
    from safetensors.torch import save

    return save({name: value.detach().cpu().contiguous() for name, value in state.items()})


def load_weights(path: str) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU."""
    from safetensors.torch import load_file

    return load_file(path)
