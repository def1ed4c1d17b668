import hashlib
import os
from pathlib import Path

import pytest

from drorae.store.content import content_id


def test_a_file_is_named_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"weights")
    (tmp_path / "b").write_bytes(b"weights")
    expected = f"sha256:{hashlib.sha256(b'weights').hexdigest()}"
    assert content_id(str(tmp_path / "a")) == content_id(str(tmp_path / "b")) == expected
    assert content_id(expected) == expected
    assert content_id("") == ""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert content_id("~/a") == expected


def test_a_changed_file_has_another_name(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"weights")
    before = content_id(str(path))
    path.write_bytes(b"Weights")
    os.utime(path, ns=(1, 1))
    assert content_id(str(path)) != before


def test_missing_files_and_broken_digests_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.pt does not exist"):
        content_id(str(tmp_path / "no.pt"))
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        content_id("sha256:XYZ")
