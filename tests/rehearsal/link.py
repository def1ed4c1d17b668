"""A node's network connection to a server, with a capped rate, which counts what passes.

A process of its own, so that its work takes no time from those that are measured. Forwards
TCP as it is, so that signatures stay valid.
"""

import asyncio
import contextlib
import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

METHODS = (b"GET ", b"PUT ", b"POST ", b"HEAD ", b"DELETE ")
CHUNK_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Link:
    """The connection of one node; can be given to other processes."""

    endpoint: str
    """Address that the node uses."""
    counts: Any
    """Shared memory: bytes that the server sent, and requests that it got."""

    @property
    def read_bytes(self) -> int:
        """Bytes that arrived at the node."""
        return self.counts[0]

    @property
    def num_requests(self) -> int:
        """Requests of the node: segments that begin with an HTTP method."""
        return self.counts[1]


@contextlib.contextmanager
def capped_link(target: str, bytes_s: float) -> Iterator[Link]:
    """A connection to a server.

    Args:
        target: Address of the server.
        bytes_s: Bytes a second that pass towards the node.
    """
    spawn = multiprocessing.get_context("spawn")
    counts = spawn.Array("q", 2, lock=False)
    mine, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(target, counts, bytes_s, theirs), daemon=True)
    process.start()
    theirs.close()  # so that its end is noticed
    try:
        yield Link(f"http://127.0.0.1:{mine.recv()}", counts)
    finally:
        process.kill()
        process.join()


class _Bucket:
    """Lets bytes pass at a rate."""

    def __init__(self, bytes_s: float) -> None:
        self._bytes_s = bytes_s
        self._free_s = 0.0

    async def take(self, count: int) -> None:
        now_s = asyncio.get_running_loop().time()
        self._free_s = max(now_s, self._free_s) + count / self._bytes_s
        await asyncio.sleep(self._free_s - now_s)


def _serve(target: str, counts: Any, bytes_s: float, parent: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    asyncio.run(_listen(target, counts, _Bucket(bytes_s), parent))


async def _listen(target: str, counts: Any, bucket: _Bucket, parent: Any) -> None:
    place = urlsplit(target)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, requests = await asyncio.open_connection(
            place.hostname, place.port, limit=CHUNK_BYTES
        )
        await asyncio.gather(
            _pump(reader, requests, counts, None), _pump(answers, writer, counts, bucket)
        )

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=CHUNK_BYTES)
    parent.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def _pump(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    counts: Any,
    bucket: _Bucket | None,
) -> None:
    """Pass bytes on until either side ends: requests without a bucket, answers with one."""
    try:
        while data := await reader.read(CHUNK_BYTES):
            if bucket is None:
                counts[1] += data.startswith(METHODS)
            else:
                counts[0] += len(data)
                await bucket.take(len(data))
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()
