"""Which failures are waited for, for how long, and what a caller sees in the end."""

import time

import pytest

from drorae.store import files, patience, s3
from drorae.store.errors import is_transient
from drorae.store.workspace import Workspace


class Answer(OSError):
    """An error as s3fs raises it: the server's answer is in the cause."""

    def __init__(self, code: str, status: int):
        super().__init__(code)
        self.__cause__ = Exception(code)
        self.__cause__.response = {
            "Error": {"Code": code},
            "ResponseMetadata": {"HTTPStatusCode": status},
        }


class EndpointConnectionError(Exception):
    """Named like the error of botocore."""


class Bucket:
    """A client whose requests fail in turn before they work."""

    def __init__(self, *failures: Exception):
        self.failures = list(failures)
        self.num_requests = 0
        self.objects: dict[str, bytes] = {}

    def _request(self) -> None:
        self.num_requests += 1
        if self.failures:
            raise self.failures.pop(0)

    def pipe_file(self, uri: str, data: bytes, **condition: str) -> None:
        self._request()
        self.objects[uri] = data

    def cat_file(self, uri: str) -> bytes:
        self._request()
        return self.objects[uri]

    def info(self, uri: str) -> dict:
        self._request()
        if uri not in self.objects:
            raise FileNotFoundError(uri)
        return {"type": "file", "size": len(self.objects[uri])}

    def call_s3(self, method: str, **arguments: str) -> None:
        self._request()


@pytest.fixture
def hurried(monkeypatch):
    """The same waits in a hundredth of the time."""
    monkeypatch.setattr(patience, "PATIENCE_S", 0.9)
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.002)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.08)


def use(monkeypatch, bucket: Bucket) -> Bucket:
    monkeypatch.setattr(s3, "filesystem", lambda: bucket)
    return bucket


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Answer("SlowDown", 503), True),
        (Answer("InternalError", 500), True),
        (Answer("503", 503), True),
        (Answer("RequestTimeout", 400), True),
        (EndpointConnectionError(), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (Answer("AccessDenied", 403), False),
        (Answer("NoSuchKey", 404), False),
        (Answer("PreconditionFailed", 412), False),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (ValueError(), False),
    ],
)
def test_only_an_absent_or_overloaded_server_is_transient(error, expected):
    assert is_transient(error) is expected


def test_a_write_survives_a_server_that_comes_back(monkeypatch, hurried):
    bucket = use(monkeypatch, Bucket(EndpointConnectionError(), Answer("SlowDown", 503)))
    files.write_bytes("s3://b/key", b"data")
    assert files.read_bytes("s3://b/key") == b"data"
    assert bucket.num_requests == 4


def test_every_request_of_many_may_fail_once(monkeypatch, hurried):
    bucket = use(monkeypatch, Bucket())
    for number in range(50):
        bucket.failures.append(Answer("ServiceUnavailable", 503))
        files.write_bytes(f"s3://b/{number}", b"x")
    assert len(bucket.objects) == 50


def test_a_server_that_stays_away_is_one_clear_error_after_the_patience(monkeypatch, hurried):
    use(monkeypatch, Bucket(*[EndpointConnectionError() for _ in range(1000)]))
    started_s = time.monotonic()
    with pytest.raises(RuntimeError, match="did not answer for s3://b/key"):
        files.write_bytes("s3://b/key", b"data")
    assert 0.85 < time.monotonic() - started_s < 2


@pytest.mark.parametrize("error", [Answer("AccessDenied", 403), Answer("NoSuchKey", 404)])
def test_a_refusal_is_told_at_once(monkeypatch, hurried, error):
    bucket = use(monkeypatch, Bucket(error))
    with pytest.raises((RuntimeError, FileNotFoundError)):
        files.read_bytes("s3://b/key")
    assert bucket.num_requests == 1


def test_existence_is_not_denied_by_a_server_that_is_away(monkeypatch, hurried):
    bucket = use(monkeypatch, Bucket(EndpointConnectionError()))
    bucket.objects["s3://b/key"] = b"x"
    assert files.exists("s3://b/key")
    assert not files.exists("s3://b/other")


def test_checks_at_the_start_do_not_wait(monkeypatch):
    bucket = use(monkeypatch, Bucket(EndpointConnectionError()))
    with pytest.raises(RuntimeError, match="did not answer"):
        Workspace("s3://b/x").check()
    assert bucket.num_requests == 1
    bucket.failures = [EndpointConnectionError()]
    with patience.patience(0), pytest.raises(RuntimeError, match="did not answer"):
        files.write_bytes("s3://b/key", b"data")


def test_the_patience_is_longer_than_a_minute():
    assert patience.PATIENCE_S >= 60
