"""Ranges of files, local and on a store that is away now and then."""

from pathlib import Path
from typing import Any

import pytest

from drorae.store import files, patience, s3


def test_a_range_is_read_exactly(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"0123456789")
    assert files.read_range(str(tmp_path / "a"), 3, 7) == b"3456"
    assert files.read_range(str(tmp_path / "a"), 4, 4) == b""
    with pytest.raises(OSError, match="ends 2 bytes before byte 12"):
        files.read_range(str(tmp_path / "a"), 8, 12)
    with pytest.raises(FileNotFoundError):
        files.read_range(str(tmp_path / "b"), 0, 1)


def test_a_range_of_an_object_is_one_request_that_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, int, int]] = []

    class Store:
        def cat_file(self, uri: str, start: int, end: int) -> bytes:
            asked.append((uri, start, end))
            if len(asked) == 1:
                raise ConnectionError
            return b"0123456789"[start:end]

    store: Any = Store()
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(s3, "filesystem", lambda: store)
    assert files.read_range("s3://b/a", 3, 7) == b"3456"
    assert asked == [("s3://b/a", 3, 7)] * 2
