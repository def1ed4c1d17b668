"""Many files, or ranges of files, read by several threads and given in order.

Neighbouring ranges of a file become one request; nothing is read ahead beyond them, so the bytes
read are those wanted and small gaps. Memory: `READ_THREADS` requests, whatever the number of spans.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from drorae.data.readers.damage import MAX_IMAGE_BYTES, TOO_LONG, is_of_machine
from drorae.data.readers.filesystem import is_remote, read_content

READ_THREADS = 16
"""Requests at the same time: an image folder on S3 answers in about 150 ms a file."""

MAX_GAP_BYTES = 64 << 10
"""Bytes between two ranges that are read and dropped rather than paid by a second request."""

MAX_REQUEST_BYTES = 4 << 20
"""Neighbouring ranges are joined up to this length."""


@dataclass(frozen=True, slots=True)
class Span:
    """A file or a range of it."""

    uri: str
    """The file."""
    start: int = 0
    """First byte."""
    size_bytes: int | None = None
    """Length; none: the whole file."""
    may_end_early: bool = False
    """Whether the file may end inside the range."""

    @property
    def end(self) -> int:
        """Byte behind the last one."""
        return self.start + (self.size_bytes or 0)


def read_spans(spans: Sequence[Span]) -> Iterator[bytes | OSError]:
    """Content of each span in order, or why it cannot be read.

    Raises:
        OSError: This machine is in trouble (too many open files, say), not the file.
        RuntimeError: An object store refused or did not answer.
    """
    groups = _neighbours(spans)
    waiting: deque[Future[list[bytes | OSError]]] = deque()
    pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read")
    try:
        for group in groups:
            waiting.append(pool.submit(_read_group, group))
            if len(waiting) >= READ_THREADS:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _neighbours(spans: Sequence[Span]) -> Iterator[list[Span]]:
    group: list[Span] = []
    for span in spans:
        if group and not _joins(group, span):
            yield group
            group = []
        group.append(span)
    if group:
        yield group


def _joins(group: list[Span], span: Span) -> bool:
    first, last = group[0], group[-1]
    if span.uri != last.uri or span.size_bytes is None or last.size_bytes is None:
        return False
    near = last.start <= span.start <= last.end + MAX_GAP_BYTES
    return near and max(span.end, last.end) - first.start <= MAX_REQUEST_BYTES


def _read_group(group: list[Span]) -> list[bytes | OSError]:
    first = group[0]
    try:
        if first.size_bytes is None:
            return [_whole(first.uri)]
        data = memoryview(read_content(first.uri, first.start, max(s.end for s in group)))
    except OSError as error:
        if is_of_machine(error):
            raise
        # A container that ends early must not spoil the ranges before its end.
        return [error] if len(group) == 1 else [_read_group([span])[0] for span in group]
    return [_cut(data, span, first.start) for span in group]


def _whole(uri: str) -> bytes:
    """A file that is no longer than a picture can be."""
    if not is_remote(uri) and os.path.getsize(uri) > MAX_IMAGE_BYTES:
        raise OSError(TOO_LONG)
    return read_content(uri)


def _cut(data: memoryview, span: Span, offset: int) -> bytes | OSError:
    found = bytes(data[span.start - offset : span.end - offset])
    missing = (span.size_bytes or 0) - len(found)
    if missing and not span.may_end_early:
        return OSError(f"file ends {missing} bytes early")
    return found
