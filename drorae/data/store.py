"""The rows of one split, wherever its shards lie.

Of a local workspace a shard is mapped where it is. Of a remote one it is mapped in the node's cache
(`shard_cache.py`), into which threads bring the shards ahead of their use, in the order that
`follow` states. A row whose shard is not here yet is read from the remote file by its range, until
a tenth of the shard was read so: more would be cheaper as a whole shard, which is then waited for.
"""

import functools
import heapq
import logging
import resource
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from drorae.config import Compute
from drorae.data.order import ShardUse
from drorae.data.shard_cache import OpenShard, Outcome, ShardCache, node_cache
from drorae.data.shard_format import Index, index_name, parse_index, part_name
from drorae.store import files
from drorae.store.errors import clear_errors, is_s3
from drorae.store.files import FileEntry
from drorae.store.workspace import StageOutput

log = logging.getLogger(__name__)

BY_RANGE_SHARE = 0.1
"""Part of a shard that is read row by row before it is waited for as a whole."""
RANGES_AT_ONCE = 16
"""Rows that are fetched by range at the same time."""
DOWNLOADS_AT_ONCE = 2
"""Shards that a process fetches ahead at the same time, each by `PARTS_AT_ONCE` requests."""
MOST_SKIPPED = 16
"""Shards fetched by other processes of which a process works ahead."""
RETRY_S = 0.5
"""Pause before a full cache, or a shard that another process fetches, is tried again."""
MOST_OPEN = 4096
"""Shards that a process keeps mapped, the limit of its open files permitting."""
SPARE_FILES = 256
"""Open files left to the rest of the process; a mapped shard takes two."""


class ShardStore:
    """Bytes of the rows of one split, by shard and place.

    Args:
        output: Output of a stage that writes shards.
        split: `train` or `val`.
        cache: Where copies of remote shards lie; none: the user's cache without a limit.
    """

    def __init__(self, output: StageOutput, split: str, cache: ShardCache | None = None) -> None:
        self.index = read_index(output, split)
        count = len(self.index.shard_rows)
        self._entries = [output.entry(part_name(split, part)) for part in range(count)]
        self._uri = output.uri
        self._is_remote = is_s3(output.uri)
        self._cache = cache or node_cache(Compute())
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._max_open = _max_open_shards()
        self._by_range: Counter[int] = Counter()
        self._uses: Counter[int] = Counter()
        self._lock = threading.RLock()
        self._warned = False
        self._ahead: _Ahead | None = None

    def read(self, places: Sequence[tuple[int, int, int]]) -> list[memoryview]:
        """The bytes at (shard, first byte, number of bytes), in their order; local ones uncopied.

        Raises:
            FileNotFoundError: A shard is missing.
            RuntimeError: A shard is damaged or cannot be read.
        """
        found: list[memoryview | None] = [self._mapped(*place) for place in places]
        missing = [number for number, data in enumerate(found) if data is None]
        if missing:
            read = self._ranges.map(lambda number: self._remote(*places[number]), missing)
            for number, data in zip(missing, read, strict=True):
                found[number] = data
        return [data for data in found if data is not None]

    def follow(self, uses: Iterable[ShardUse]) -> None:
        """Bring shards in this order from now on, in the background; replaces an earlier order.

        Args:
            uses: In the order of their first step; taken only as far as there is room.
        """
        if not self._is_remote:
            return
        if self._ahead is not None:
            self._ahead.stop()
        with self._lock:
            self._uses.clear()
            self._close_idle()  # else they take the room of what other processes need
        self._ahead = _Ahead(self, uses)

    def reached(self, step: int) -> None:
        """Let go of the shards whose last step lies before this one."""
        if self._ahead is not None:
            self._ahead.reached(step)

    def bring(self, shard: int, reserved: Callable[[], None] = lambda: None) -> Outcome:
        """Have a shard here and mapped, without waiting for a process that fetches it already.

        Args:
            shard: Its number.
            reserved: Called when it has room, before it is fetched; not if it is not fetched.

        Raises:
            FileNotFoundError: The remote file does not exist.
            RuntimeError: It is damaged or cannot be read.
        """
        with self._lock:
            if shard in self._open:
                return "here"
        entry = self._entries[shard]
        outcome = self._cache.bring(self._uri_of(entry), entry, reserved)
        if outcome == "full":
            self._close_idle()
        if outcome != "here":
            return outcome
        found = self._cache.find(entry)
        if found is None:
            return "busy"
        self._keep(shard, found)
        return "here"

    def use(self, shard: int, times: int) -> None:
        """Count a coming use of a shard (+1), or one that is over (-1); at none it is let go."""
        with self._lock:
            self._uses[shard] += times
            if self._uses[shard] <= 0 and (opened := self._open.pop(shard, None)):
                opened.close()

    @functools.cached_property
    def _ranges(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(RANGES_AT_ONCE, thread_name_prefix="ranges")

    def _uri_of(self, entry: FileEntry) -> str:
        return files.join(self._uri, entry.name)

    def _mapped(self, shard: int, start: int, size: int) -> memoryview | None:
        with self._lock:
            opened = self._open.get(shard)
            if opened is not None:
                self._open.move_to_end(shard)
                return opened.data[start : start + size]
        entry = self._entries[shard]
        opened = self._cache.find(entry) if self._is_remote else _open_local(self._uri, entry)
        if opened is None:
            return None
        self._keep(shard, opened)
        return opened.data[start : start + size]

    def _remote(self, shard: int, start: int, size: int) -> memoryview:
        if (data := self._mapped(shard, start, size)) is not None:  # it came meanwhile
            return data
        entry = self._entries[shard]
        with self._lock:
            self._by_range[shard] += size
            is_spent = self._by_range[shard] > BY_RANGE_SHARE * entry.size_bytes
        if is_spent and (opened := self._waited_for(shard)):
            return opened.data[start : start + size]
        return memoryview(self._cache.fetch(self._uri_of(entry), start, start + size))

    def _waited_for(self, shard: int) -> OpenShard | None:
        entry = self._entries[shard]
        opened = self._cache.get(self._uri_of(entry), entry)
        if opened is None:
            self._close_idle()
            opened = self._cache.get(self._uri_of(entry), entry)
        if opened is None:
            self._warn_full(entry)
            return None
        self._keep(shard, opened)
        return opened

    def _keep(self, shard: int, opened: OpenShard) -> None:
        with self._lock:
            if shard in self._open:  # two threads were at it
                opened.close()
                return
            self._open[shard] = opened
            self._by_range.pop(shard, None)
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)[1].close()

    def _close_idle(self) -> None:
        """Let go of the shards that no coming use is known of, so that they can make room."""
        with self._lock:
            for shard in [shard for shard in self._open if self._uses[shard] <= 0]:
                self._open.pop(shard).close()

    def _warn_full(self, entry: FileEntry) -> None:
        with self._lock:
            if self._warned:
                return
            self._warned = True
        log.warning(
            "the cache %s holds %.2f GB that are in use, with a limit of %.2f GB: shards of %.2f "
            "GB do not fit, and their rows are read one by one. Raise compute.cache_limit_gb.",
            self._cache.folder,
            self._cache.used_bytes() / 1e9,
            self._cache.limit_bytes / 1e9,
            entry.size_bytes / 1e9,
        )


class _Ahead:
    """Threads that bring the shards of a plan, in its order, and keep them until they are passed.

    They download at the same time, but take turns at choosing a shard and reserving its room: a
    later shard must not take the room of an earlier one.

    Args:
        store: What to bring them into.
        uses: The plan.
    """

    def __init__(self, store: ShardStore, uses: Iterable[ShardUse]) -> None:
        self._store = store
        self._coming: Iterator[ShardUse] = iter(uses)
        self._later: deque[ShardUse] = deque()
        self._taken: list[tuple[int, int]] = []
        self._step = 0
        self._is_exhausted = False
        self._without_room: ShardUse | None = None
        self._changed = threading.Condition()
        self._turn = threading.Lock()
        self._stopped = False
        for _ in range(DOWNLOADS_AT_ONCE):
            threading.Thread(target=self._work, name="shards ahead", daemon=True).start()

    def stop(self) -> None:
        """End after what is being fetched now."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def reached(self, step: int) -> None:
        with self._changed:
            self._step = step
            while self._taken and self._taken[0][0] < step:
                self._store.use(heapq.heappop(self._taken)[1], -1)
                self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with ExitStack() as turn:
                turn.enter_context(self._turn)
                use = self._next()
                if use is None:
                    return
                self._bring(use, turn.close)

    def _bring(self, use: ShardUse, end_turn: Callable[[], None]) -> None:
        try:
            outcome = self._store.bring(use.shard, end_turn)
        except (OSError, RuntimeError) as error:
            # Whoever needs a row of it gets the error; the others need not.
            log.warning("shard %d could not be fetched ahead: %s", use.shard, error)
            return
        with self._changed:
            if self._stopped or use.last_step < self._step:
                self._store.use(use.shard, 0)  # it came too late
            elif outcome != "here":
                self._later.append(use)
                if outcome == "full" and self._without_room is None:
                    self._without_room = use

    def _next(self) -> ShardUse | None:
        """A use to work on; waits where there is no room, or no more to do than to try again."""
        while not self._stopped:
            if self._may_take() and (use := self._take()) is not None:
                return use
            with self._changed:
                if self._is_exhausted and not self._later:
                    return None
                self._changed.wait(RETRY_S)
                while self._later and not self._stopped:
                    use = self._later.popleft()
                    if use is self._without_room:
                        self._without_room = None
                    if use.last_step >= self._step:
                        return use
        return None

    def _may_take(self) -> bool:
        with self._changed:
            # Plans may be endless: two epochs ahead are enough where everything is here already.
            is_far = len(self._taken) >= 2 * len(self._store.index.shard_rows)
            is_full = self._without_room is not None
            return not is_full and not is_far and len(self._later) < MOST_SKIPPED

    def _take(self) -> ShardUse | None:
        """The next use that is not over yet, counted as coming."""
        # A plan is worked out as it is read, which may take a while once an epoch: `reached`, which
        # a training loop calls, must not wait for it.
        use = next((use for use in self._coming if use.last_step >= self._step), None)
        with self._changed:
            self._is_exhausted = use is None
            if use is not None and not self._stopped:
                heapq.heappush(self._taken, (use.last_step, use.shard))
                self._store.use(use.shard, 1)
        return use


def read_index(output: StageOutput, split: str) -> Index:
    """Index of a split: one small file, no shard.

    Raises:
        FileNotFoundError: The output has none.
    """
    return parse_index(files.read_bytes(output.uri_of(index_name(split))))


def _open_local(uri: str, entry: FileEntry) -> OpenShard:
    path = Path(uri, entry.name)
    with clear_errors(str(path)), path.open("rb") as file:
        size = path.stat().st_size
        # Reading past the end of a mapped file ends the process.
        if size != entry.size_bytes:
            raise RuntimeError(
                f"{path} has {size} bytes: expected {entry.size_bytes}, as its manifest says; "
                "build its stage again."
            )
        return OpenShard(file, None)


def _max_open_shards() -> int:
    """Shards that may be mapped at a time; raises the process's limit of open files as needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted = 2 * MOST_OPEN + SPARE_FILES
    if hard != resource.RLIM_INFINITY:
        limit = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return max(2, (limit - SPARE_FILES) // 2)
