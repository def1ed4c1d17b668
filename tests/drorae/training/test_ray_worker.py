"""What can be told of the worker entry without a cluster; `make chaos` breaks real ones."""

from dataclasses import replace

import pytest

from drorae.config import Compute
from drorae.failure import Failure, Fatal
from drorae.store.context import StageContext, StageResult
from drorae.training import failures

RayActorError = pytest.importorskip("ray.exceptions").RayActorError
ray_worker = pytest.importorskip("drorae.training.ray_worker")
check_worker_counts, train_on_ray = ray_worker.check_worker_counts, ray_worker.train_on_ray


@pytest.fixture
def ctx(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_worker, "connect_ray", lambda compute: False)
    monkeypatch.setattr(ray_worker.ray, "shutdown", lambda: None)
    for name in ray_worker._timeouts(Compute()):
        monkeypatch.delenv(name, raising=False)
    return StageContext(stage="fusion", key="k", output_uri=str(tmp_path / "out"))


def test_an_elastic_group_has_to_share_the_batch_at_every_size():
    compute = Compute(num_workers=4, min_workers=2)
    check_worker_counts(compute, 12)
    with pytest.raises(ValueError, match="on 3 workers, which cannot share a global batch of 8"):
        check_worker_counts(compute, 8)
    with pytest.raises(ValueError, match="on 4 workers"):
        check_worker_counts(replace(compute, accumulate_steps=2), 12)
    check_worker_counts(replace(compute, min_workers=0), 7)


@pytest.mark.parametrize("min_workers", [-1, 5])
def test_the_fewest_workers_lie_between_none_and_all(min_workers):
    with pytest.raises(ValueError, match=r"compute\.min_workers"):
        Compute(num_workers=4, min_workers=min_workers)


def test_no_timeout_is_left_at_none_or_at_half_an_hour():
    timeouts = ray_worker._timeouts(Compute())
    seconds = {name: float(value) for name, value in timeouts.items()}
    assert seconds["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] <= 60
    assert seconds["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] == 600
    hasty = ray_worker._timeouts(Compute(hang_timeout_s=20, num_workers=2, min_workers=1))
    assert float(hasty["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"]) == 20
    assert float(hasty["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]) == 10


def test_a_lost_controller_is_followed_by_another(ctx, monkeypatch):
    starts = []

    def fit(ctx, train, sections, restart):
        starts.append(restart)
        if restart < 2:
            raise RayActorError()
        ray_worker.files.write_json(
            ray_worker._result_uri(ctx), {"files": [], "metrics": {"loss": 1.0}}
        )

    monkeypatch.setattr(ray_worker, "_fit", fit)
    result = train_on_ray(ctx, lambda *a, **k: StageResult(files=[]), {})
    assert starts == [0, 1, 2]
    assert result.metrics == {"loss": 1.0}


def test_controllers_that_are_lost_again_and_again_end_the_stage(ctx, monkeypatch):
    def fit(*arguments):
        raise RayActorError()

    monkeypatch.setattr(ray_worker, "_fit", fit)
    with pytest.raises(RuntimeError, match="controller was lost 4 times"):
        train_on_ray(ctx, lambda *a, **k: StageResult(files=[]), {})


def saved(ctx, step):
    ray_worker.files.write_json(f"{ctx.work_uri}/checkpoints/step-{step:08d}.json", {})


@pytest.mark.parametrize("error", [RayActorError, RuntimeError])
def test_failures_after_which_training_advanced_are_forgotten(ctx, monkeypatch, error):
    starts = []

    def fit(ctx, train, sections, number):
        starts.append(number)
        if number == 10:
            ray_worker.files.write_json(
                ray_worker._result_uri(ctx), {"files": [], "metrics": {"loss": 1.0}}
            )
            return
        saved(ctx, 5 * number)
        raise error("lost")

    monkeypatch.setattr(ray_worker, "_fit", fit)
    train_on_ray(ctx, lambda *a, **k: StageResult(files=[]), {})
    assert starts == list(range(11))


def test_failures_without_a_new_checkpoint_end_the_stage(ctx, monkeypatch):
    starts = []

    def fit(ctx, train, sections, number):
        starts.append(number)
        saved(ctx, min(number, 2))
        raise RuntimeError("lost")

    monkeypatch.setattr(ray_worker, "_fit", fit)
    with pytest.raises(RuntimeError, match="lost"):
        train_on_ray(ctx, lambda *a, **k: StageResult(files=[]), {})
    assert starts == [0, 1, 2, 3]


def test_without_restarts_the_first_failure_ends_the_stage(ctx, monkeypatch):
    starts = []

    def fit(ctx, train, sections, number):
        starts.append(number)
        saved(ctx, number)
        raise RuntimeError("lost")

    monkeypatch.setattr(ray_worker, "_fit", fit)
    none = replace(ctx, compute=Compute(max_failures=0))
    with pytest.raises(RuntimeError, match="lost"):
        train_on_ray(none, lambda *a, **k: StageResult(files=[]), {})
    assert starts == [0]


@pytest.mark.parametrize("error", [Fatal("not finite"), ValueError("a mistake")])
def test_what_would_come_again_is_not_run_again(ctx, monkeypatch, error):
    starts = []

    def fit(ctx, train, sections, number):
        starts.append(number)
        saved(ctx, 5 * number + 5)
        raise error

    monkeypatch.setattr(ray_worker, "_fit", fit)
    with pytest.raises(type(error)) as caught:
        train_on_ray(ctx, lambda *a, **k: StageResult(files=[]), {})
    assert caught.value is error
    assert starts == [0]


def test_a_system_error_is_the_cause_of_what_is_raised(ctx, monkeypatch):
    failure = Failure(rank=0, type="RuntimeError", message="no space left", errno=28, is_final=True)
    monkeypatch.setattr(ray_worker, "first_failure", lambda uri: (failure, {}))
    with pytest.raises(RuntimeError, match="fusion, rank 0: no space left") as caught:
        ray_worker._raise_first(ctx, Exception("Ray's words"))
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == 28


def test_the_error_of_an_earlier_run_is_not_told_again(ctx, monkeypatch):
    class Trainer:
        def fit(self):
            raise RuntimeError("no worker started")

    folder_uri = failures.start_group(ray_worker._ranks_uri(ctx), "earlier", 0, 1)
    failures.record_error(folder_uri, 0, ValueError("a mistake of yesterday"))
    monkeypatch.setattr(ray_worker, "_trainer", lambda *arguments: Trainer())
    with pytest.raises(RuntimeError, match="no worker started"):
        ray_worker._fit(ctx, lambda *a, **k: StageResult(files=[]), {}, 0)
