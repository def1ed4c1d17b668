"""Trackers against fakes that lose the connection, and against a real MLflow on SQLite."""

import multiprocessing
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
from mlflow.entities import Metric

from drorae.tracking import MlflowTracker, NullTracker, connect, finish_run, open_run
from drorae.tracking.client import open_client
from tests.chaos.mlflow_stub import MlflowStub

# MLflow 3.17 uses a SQLAlchemy option that SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

IMAGE = np.zeros((4, 6, 3), np.uint8)


@dataclass
class FakeClient:
    """Remembers what arrives; raises while `away`, and sleeps while `slow_s`."""

    away: Exception | None = None
    slow_s: float = 0.0
    arrived: list = field(default_factory=list)
    num_requests: int = 0

    def log_batch(self, run_id, metrics):
        self._request()
        self.arrived += [(m.key, m.value, m.step) for m in metrics]

    def log_image(self, run_id, image, key, step, timestamp, synchronous):
        self._request()
        self.arrived.append((key, image.shape, step))

    def log_artifact(self, run_id, path, folder):
        self._request()
        self.arrived.append((path, folder))

    def _request(self):
        self.num_requests += 1
        time.sleep(self.slow_s)
        if self.away:
            raise self.away


def tracker_on(client, **options):
    options = {"flush_every_s": 0.05, "close_timeout_s": 20} | options
    return MlflowTracker("http://fake", "run", make_client=lambda uri: client, **options)


def test_points_arrive_in_order_in_few_requests(tmp_path):
    client = FakeClient()
    tracker = tracker_on(client, flush_every_s=0.3)
    for step in range(300):
        tracker.log({"a/loss": step, "speed": 1.0}, step)
    tracker.image("grid", IMAGE, 300)
    (tmp_path / "file.json").write_text("{}")
    tracker.artifact(tmp_path / "file.json", "reports")
    tracker.log({"a/loss": 0.5}, 301)
    tracker.close()
    losses = [row for row in client.arrived if row[0] == "a/loss"]
    assert losses == [("a/loss", float(s), s) for s in range(300)] + [("a/loss", 0.5, 301)]
    assert client.arrived[-3:-1] == [
        ("grid", (4, 6, 3), 300),
        (str(tmp_path / "file.json"), "reports"),
    ]
    assert client.num_requests <= 6


def test_nothing_is_lost_while_the_server_is_away():
    client = FakeClient(away=ConnectionError("refused"))
    tracker = tracker_on(client)
    for step in range(10):
        tracker.log({"loss": step}, step)
        time.sleep(0.05)
    assert client.arrived == []
    client.away = None
    tracker.close()
    assert [row[2] for row in client.arrived] == list(range(10))


def test_logging_never_blocks_on_a_slow_server():
    client = FakeClient(slow_s=1.0)
    tracker = tracker_on(client, close_timeout_s=0.1)
    started_s = time.monotonic()
    for step in range(1000):
        tracker.log({"loss": 0.0}, step)
    assert time.monotonic() - started_s < 0.5
    tracker.close()


def test_close_gives_up_on_an_absent_server(caplog):
    tracker = tracker_on(FakeClient(away=ConnectionError("refused")), close_timeout_s=0.3)
    tracker.log({"loss": 1.0}, 0)
    tracker.close()
    assert "1 entries were not delivered" in caplog.text
    tracker.log({"loss": 1.0}, 1)
    assert tracker.num_dropped == 1


def test_full_queue_drops_and_says_so(caplog, monkeypatch):
    monkeypatch.setattr("drorae.tracking.outbox.MAX_WAITING_ITEMS", 3)
    monkeypatch.setattr("drorae.tracking.outbox.MAX_WAITING_IMAGE_BYTES", IMAGE.nbytes)
    client = FakeClient()
    tracker = tracker_on(client, flush_every_s=5)
    tracker.image("grid", IMAGE, 0)
    tracker.image("grid", IMAGE, 1)
    for step in range(5):
        tracker.log({"loss": step}, step)
    tracker.close()
    assert client.arrived == [("grid", (4, 6, 3), 0), ("loss", 0.0, 0), ("loss", 1.0, 1)]
    assert tracker.num_dropped == 4
    assert caplog.text.count("entries are dropped") == 1


def test_refused_entry_does_not_hold_up_the_next(caplog):
    class Picky(FakeClient):
        def log_image(self, *args, **kwargs):
            raise ValueError("no pictures here")

    client = Picky()
    tracker = tracker_on(client)
    tracker.image("grid", IMAGE, 0)
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    assert client.arrived == [("loss", 1.0, 1)]
    assert "no pictures here" in caplog.text


def test_more_points_than_one_request_holds():
    client = FakeClient()
    tracker = tracker_on(client)
    tracker.log({f"m{i}": i for i in range(1500)}, 0)
    tracker.log({"last": 1}, 1)
    tracker.close()
    assert len(client.arrived) == 1501


@pytest.mark.parametrize("image", [IMAGE[..., :1], IMAGE[0], IMAGE.astype(np.float32)])
def test_picture_of_another_kind_is_refused(image):
    tracker = tracker_on(FakeClient())
    with pytest.raises(ValueError, match=r"expected uint8"):
        tracker.image("grid", image, 0)
    tracker.close()


def test_missing_artifact_is_refused_at_once(tmp_path):
    tracker = tracker_on(FakeClient())
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt"):
        tracker.artifact(tmp_path / "nothing.txt")
    tracker.close()


@dataclass
class Stage:
    tracking_uri: str | None
    tracking_run_id: str | None


def test_stage_without_a_run_tracks_nothing(tmp_path):
    tracker = connect(Stage(None, None))
    assert isinstance(tracker, NullTracker)
    tracker.log({"a": 1.0}, 0)
    tracker.image("a", IMAGE, 0)
    tracker.artifact(tmp_path / "missing")
    tracker.close()


@pytest.fixture(scope="module")
def sqlite_uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/sub/mlflow.db"


def test_stage_run_is_nested_and_continued_across_attempts(sqlite_uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parent = open_run(sqlite_uri, "drorae", "pipeline-1", "full", params={"seed": 1})
    child = open_run(
        sqlite_uri,
        "drorae",
        "fusion-abc",
        "fusion",
        parent,
        params={"lr": 1e-4, "long": "x" * 7000},
    )
    first = connect(Stage(sqlite_uri, child))
    first.log({"fusion/train/loss": 2.0, "weird name (%)": 1.0}, 0)
    first.image("grid", IMAGE, 0)
    (tmp_path / "report.html").write_text("hello")
    first.artifact(tmp_path / "report.html", "reports")
    first.close()
    finish_run(sqlite_uri, child, "FAILED")

    again = open_run(
        sqlite_uri,
        "drorae",
        "fusion-abc",
        "fusion",
        parent,
        params={"lr": 5e-4, "new": True},
        tags={"attempt": 2},
    )
    assert again == child
    second = connect(Stage(sqlite_uri, again))
    second.log({"fusion/train/loss": 1.0}, 1)
    second.log({"fusion/train/loss": float("nan")}, 2)
    second.close()
    client = open_client(sqlite_uri)
    run = client.get_run(child)
    assert run.info.status == "RUNNING"
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.tags["attempt"] == "2"
    assert (run.data.params["lr"], run.data.params["new"]) == ("0.0001", "True")
    assert len(run.data.params["long"]) == 6000
    history = client.get_metric_history(child, "fusion/train/loss")
    assert [(m.step, m.value) for m in history][:2] == [(0, 2.0), (1, 1.0)]
    assert [a.path for a in client.list_artifacts(child, "reports")] == ["reports/report.html"]
    assert any(a.path.endswith(".png") for a in client.list_artifacts(child, "images"))
    finish_run(sqlite_uri, child)
    assert client.get_run(child).info.status == "FINISHED"
    assert not (tmp_path / "mlruns").exists()


def test_deleted_experiment_is_restored(sqlite_uri):
    first = open_run(sqlite_uri, "trash", "key", "name")
    client = open_client(sqlite_uri)
    client.delete_experiment(client.get_run(first).info.experiment_id)
    open_run(sqlite_uri, "trash", "other", "name")


def test_wrong_arguments_are_refused(sqlite_uri):
    with pytest.raises(ValueError, match="run_key"):
        open_run(sqlite_uri, "drorae", "it's", "name")
    with pytest.raises(ValueError, match="end state"):
        finish_run(sqlite_uri, "run", "DONE")


def test_unknown_run_is_dropped_not_repeated(sqlite_uri, caplog):
    tracker = MlflowTracker(sqlite_uri, "0" * 32, flush_every_s=0.05)
    tracker.log({"loss": 1.0}, 0)
    tracker.close()
    assert "refused" in caplog.text


def test_absent_server_is_one_clear_error(monkeypatch):
    monkeypatch.setattr("drorae.tracking.retries.OPEN_PATIENCE_S", 1.0)
    with pytest.raises(RuntimeError, match="did not answer for 1 s"):
        open_run("http://127.0.0.1:9", "drorae", "key", "name")


def _open_and_log(uri: str, barrier, name: str) -> None:
    barrier.wait()
    run_id = open_run(uri, "drorae", "shared" if name == "shared" else f"run-{name}", name)
    tracker = MlflowTracker(uri, run_id, flush_every_s=0.05)
    for step in range(50):
        tracker.log({name: step}, step)
        time.sleep(0.01)
    tracker.close()


@pytest.mark.slow
def test_two_processes_may_open_a_fresh_database_at_once(tmp_path):
    uri = f"sqlite:///{tmp_path}/fresh.db"
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2)
    processes = [spawn.Process(target=_open_and_log, args=(uri, barrier, n)) for n in ("a", "b")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    client = open_client(uri)
    experiment = client.get_experiment_by_name("drorae")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(r.info.run_name for r in runs) == ["a", "b"]
    for run in runs:
        assert len(client.get_metric_history(run.info.run_id, run.info.run_name)) == 50


def test_one_key_opened_from_many_threads_is_one_run(sqlite_uri):
    found = set()
    threads = [
        threading.Thread(target=lambda: found.add(open_run(sqlite_uri, "drorae", "same", "n")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 1


def test_real_client_delivers_all_points_after_an_outage(monkeypatch):
    monkeypatch.setattr("drorae.tracking.retries.RETRY_S", (0.1, 0.3))
    server = MlflowStub()
    tracker = MlflowTracker(server.uri, "run", flush_every_s=0.05)
    slowest_s = 0.0
    for step in range(60):
        if step in (20, 40):
            (server.go if step == 20 else server.come)()
        started_s = time.perf_counter()
        tracker.log({"loss": float(step)}, step)
        slowest_s = max(slowest_s, time.perf_counter() - started_s)
        time.sleep(0.05)
    tracker.close()
    server.go()
    assert server.points == [("loss", s, float(s)) for s in range(60)]
    assert slowest_s < 0.5


@dataclass
class Server(FakeClient):
    """Tells as well what it holds; several trackers may use it."""

    def get_metric_history(self, run_id, key):
        self._request()
        return [Metric(k, value, 0, step) for k, value, step in self.arrived if k == key]


def rows_until(num_steps: int) -> list[dict[str, float]]:
    rows = []
    for step in range(num_steps):
        rows.append({"step": step, "loss": 1 / (step + 1), "speed": 9.0})
        if step % 2 == 0:
            rows.append({"step": step, "eval/psnr": 20.0 + step, "best": 30.0})
    return rows


def test_the_next_attempt_delivers_what_waited_in_a_killed_one_and_repeats_nothing():
    server = Server()
    history = rows_until(8)
    for row in [*history[:4], history[7]]:  # the others waited when the process was killed
        values = [(name, value) for name, value in row.items() if name != "step"]
        server.arrived += [(name, value, row["step"]) for name, value in values]
    tracker = tracker_on(server)
    tracker.catch_up(history[:9])  # the checkpoint is older than what arrived last
    for row in rows_until(10)[9:]:
        tracker.log({k: v for k, v in row.items() if k != "step"}, row["step"])
    tracker.close()
    expected = [(k, v, r["step"]) for r in rows_until(10) for k, v in r.items() if k != "step"]
    assert sorted(server.arrived) == sorted(expected)
    assert server.num_requests <= 5


def test_a_catch_up_waits_for_an_absent_server_as_points_do():
    server = Server(away=ConnectionError("refused"))
    tracker = tracker_on(server)
    tracker.catch_up(rows_until(3))
    tracker.log({"loss": 0.1}, 3)
    time.sleep(0.2)
    server.away = None
    tracker.close()
    assert [row[2] for row in server.arrived if row[0] == "loss"] == [0, 1, 2, 3]


def test_a_run_of_other_values_is_logged_beside_the_old_one():
    server = Server(arrived=[("loss", 7.0, 0), ("loss", 7.0, 1)])
    tracker = tracker_on(server)
    tracker.catch_up([{"step": 0, "loss": 1.0}])
    tracker.log({"loss": 2.0}, 1)
    tracker.close()
    assert server.arrived[2:] == [("loss", 1.0, 0), ("loss", 2.0, 1)]


def test_a_real_client_catches_up():
    stub = MlflowStub()
    try:
        for attempt in range(2):
            tracker = MlflowTracker(stub.uri, "run", flush_every_s=0.05)
            tracker.catch_up(rows_until(3 * attempt + 1))
            tracker.log({"loss": 1 / (3 * attempt + 2)}, 3 * attempt + 1)
            tracker.close()
    finally:
        stub.go()
    steps = sorted(step for name, step, _ in stub.points if name == "loss")
    assert steps == [0, 1, 2, 3, 4]
