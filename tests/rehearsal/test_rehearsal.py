"""The rehearsal measures what it says; it is not run here."""

import queue
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from tests.rehearsal.__main__ import CHECKS, main
from tests.rehearsal.bench import next_result
from tests.rehearsal.line import Line, render
from tests.rehearsal.link import capped_link
from tests.rehearsal.pictures import photo_jpeg

ANSWER_BYTES = 200_000


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(ANSWER_BYTES))
        self.end_headers()
        self.wfile.write(bytes(ANSWER_BYTES))

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_link_counts_what_it_carries_and_keeps_its_rate(endpoint: str) -> None:
    with capped_link(endpoint, bytes_s=1e6) as link:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        started_s = time.monotonic()
        for _ in range(2):
            with opener.open(link.endpoint) as answer:
                assert len(answer.read()) == ANSWER_BYTES
        assert time.monotonic() - started_s > 0.9 * 2 * ANSWER_BYTES / 1e6
        assert link.num_requests == 2
        assert 2 * ANSWER_BYTES < link.read_bytes < 2 * ANSWER_BYTES + 2000  # with headers


def test_a_failed_rank_is_not_waited_for() -> None:
    ranks = [SimpleNamespace(exitcode=None), SimpleNamespace(exitcode=1)]
    started_s = time.monotonic()
    with pytest.raises(RuntimeError, match="rank failed"):
        next_result(queue.Queue(), ranks)
    assert time.monotonic() - started_s < 10


def test_a_line_holds_its_number_against_its_bound() -> None:
    low = Line(check="a", what="seconds", measured=3, bound=2)
    high = Line(check="a", what="rows", measured=3, bound=2, side="at least")
    assert (low.ok, high.ok) == (False, True)
    table = render([low, high]).splitlines()
    assert [row.split("|")[-2].strip() for row in table[2:]] == ["FAIL", "ok"]


def test_photographs_have_the_size_of_imagenets() -> None:
    sizes = [len(photo_jpeg(seed)) for seed in range(4)]
    assert 50_000 < sum(sizes) / len(sizes) < 150_000
    assert len(set(sizes)) == 4


def test_every_check_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(CHECKS)
    assert all(len(line.split()) > 3 for line in lines)
