import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import prefect_api


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/api/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/api"
        httpd.shutdown()


def test_the_environment_wins_over_the_file_and_the_file_over_the_profile(tmp_path: Path) -> None:
    environment = {"PREFECT_HOME": str(tmp_path)}
    assert prefect_api.configured_url(environment, tmp_path) is None
    profile = 'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "http://profile/api"\n'
    (tmp_path / "profiles.toml").write_text(profile)
    assert prefect_api.configured_url(environment, tmp_path) == "http://profile/api"
    (tmp_path / "prefect.toml").write_text('[api]\nurl = "http://file/api"\n')
    assert prefect_api.configured_url(environment, tmp_path) == "http://file/api"
    environment["PREFECT_API_URL"] = "http://variable/api"
    assert prefect_api.configured_url(environment, tmp_path) == "http://variable/api"


def test_the_profiles_may_lie_below_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    profile = 'active = "größer"\n[profiles."größer"]\nPREFECT_API_URL = "http://profile/api"\n'
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "profiles.toml").write_text(profile, encoding="utf-8")
    found = prefect_api.configured_url({"PREFECT_HOME": "~/own"}, tmp_path)
    assert found == "http://profile/api"


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "prefect.toml").write_text("[api")
    with pytest.raises(ValueError, match=r"prefect\.toml is not TOML"):
        prefect_api.configured_url({"PREFECT_HOME": str(tmp_path)}, tmp_path)


def test_health_is_seen(server: str) -> None:
    assert prefect_api.is_healthy(server)
    assert not prefect_api.is_healthy(server.replace("/api", "/other"))
    assert not prefect_api.is_healthy("http://127.0.0.1:1/api")


def test_a_server_that_answers_is_used(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*prefect_api.QUIET, "PREFECT_API_URL"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("PREFECT_API_URL", server)
    with prefect_api.prefect_api(tmp_path):
        prefect_api.wait_until_ready()
        assert os.environ["PREFECT_API_URL"] == server
    assert not (tmp_path / "prefect").exists()


def test_two_runs_do_not_share_a_database(tmp_path: Path) -> None:
    with (
        prefect_api._private_home(tmp_path) as first,
        prefect_api._private_home(tmp_path) as second,
    ):
        assert first != second
    with prefect_api._private_home(tmp_path) as again:
        assert again == first


def test_a_server_that_never_answers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    monkeypatch.setattr(prefect_api, "START_TIMEOUT_S", 0.0)
    with pytest.raises(RuntimeError, match="did not start"):
        prefect_api.wait_until_ready()


def test_a_private_server_that_ended_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    process.wait()
    with pytest.raises(RuntimeError, match="ended with exit code 3"):
        prefect_api.wait_until_ready(process)
