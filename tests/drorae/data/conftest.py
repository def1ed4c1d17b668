from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRORAE_CACHE", str(tmp_path / "user-cache"))
    monkeypatch.setenv("DRORAE_ASSETS", str(tmp_path / "assets"))
