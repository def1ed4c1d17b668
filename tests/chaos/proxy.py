"""A small HTTP proxy in front of an S3 server: refuses a share of the requests, or cuts uploads."""

import http.client
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

BUSY = (
    b'<?xml version="1.0"?><Error><Code>ServiceUnavailable</Code>'
    b"<Message>Reduce your request rate.</Message></Error>"
)
NOT_FORWARDED = {"connection", "expect", "keep-alive", "transfer-encoding"}


class Proxy:
    """Forwards to one server; signatures stay valid, since the Host header is passed on.

    Args:
        target: Address of the server.
        seed: Seed of the refusals.
    """

    def __init__(self, target: str, seed: int) -> None:
        self.share_refused = 0.0
        """Share of the requests that is answered 503."""
        self.cut_after: int | None = None
        """Bytes of an upload that reach the server before both connections break."""
        self.num_requests = 0
        """Requests so far."""
        self.num_refused = 0
        """Requests that were answered 503."""
        self._draw = random.Random(seed)
        self._lock = threading.Lock()
        self._target = urlsplit(target).netloc
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        """Address of the proxy."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def refuses(self) -> bool:
        """Whether the next request is answered 503."""
        with self._lock:
            self.num_requests += 1
            refused = self._draw.random() < self.share_refused
            self.num_refused += refused
            return refused

    def forward(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any, bytes]:
        """Status, headers and body of the server's answer.

        Raises:
            OSError: The server is away, or the upload was cut.
        """
        connection = http.client.HTTPConnection(self._target, timeout=60)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                if name.lower() not in NOT_FORWARDED | {"content-length"}:
                    connection.putheader(name, value)
            if body or method in ("PUT", "POST"):
                connection.putheader("Content-Length", str(len(body)))
            cut = self.cut_after if method == "PUT" else None
            connection.endheaders(body if cut is None else body[:cut])
            if cut is not None and cut < len(body):
                raise ConnectionResetError("the upload was cut")
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    return type("ProxyHandler", (_Handler,), {"proxy": proxy})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def do_GET(self) -> None:
        body = self._body()
        if self.proxy.refuses():
            self._answer(503, [("Content-Type", "application/xml")], BUSY)
            return
        try:
            answer = self.proxy.forward(self.command, self.path, self.headers, body)
        except (OSError, http.client.HTTPException):
            self.close_connection = True
            return
        self._answer(*answer)

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(chunks)

    def _answer(self, status: int, headers: Any, body: bytes) -> None:
        is_head = self.command == "HEAD"  # it has the length of a body, but none
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in NOT_FORWARDED and (is_head or name.lower() != "content-length"):
                self.send_header(name, value)
        if not is_head:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if is_head else body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""
