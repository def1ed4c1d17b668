"""An MLflow server as far as a tracker needs one, which can go away and come back."""

import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


class MlflowStub:
    """Takes metrics over MLflow's REST interface while it is up.

    Its port is chosen once; away means that nobody listens there, so that connections are refused.
    """

    def __init__(self) -> None:
        self.points: list[tuple[str, int, float]] = []
        """Name, step and value of every metric, in the order of arrival."""
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self.come()

    @property
    def uri(self) -> str:
        """Tracking address."""
        return f"http://127.0.0.1:{self._port}"

    def come(self) -> None:
        """Listen."""
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path.endswith("/runs/log-batch"):
                    stub.points += [(m["key"], int(m["step"]), m["value"]) for m in body["metrics"]]
                self._answer(200)

            def do_GET(self) -> None:
                address = urlsplit(self.path)
                if not address.path.endswith("/metrics/get-history"):
                    self._answer(404)
                    return
                name = parse_qs(address.query)["metric_key"][0]
                found = [
                    {"key": key, "step": step, "value": value, "timestamp": 0}
                    for key, step, value in stub.points
                    if key == name
                ]
                self._answer(200, {"metrics": found})

            def _answer(self, status: int, content: Mapping[str, Any] | None = None) -> None:
                body = json.dumps(content or {}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Print nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def go(self) -> None:
        """Refuse connections from now on."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
