"""The only place where training meets Ray Train: start workers, join them, return rank 0's result.

A training stage is a function `train(ctx, world, **sections) -> StageResult` that knows no Ray.
Here it is run in every worker of a Ray Train group. Restarts after a lost worker go through Ray's
failure policy. It counts all failures of a run together and does not cover a lost controller, so
`train_on_ray` starts another run after either, as long as checkpoints advance; the function then
finds its own last checkpoint. Ray's checkpoint store is not used: a reported checkpoint is
registered only at the controller's next poll, and one written in the second before a crash is lost
(measured 2026-11-21, Ray 2.60).
"""

import itertools
import logging
import os
from collections.abc import Callable
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.util.placement_group import get_current_placement_group

from drorae.checkpoint import newest_step
from drorae.config import Compute, Resources, from_json, to_json
from drorae.data.ray_session import connect_ray
from drorae.failure import is_final
from drorae.store import files
from drorae.store.context import StageContext, StageResult
from drorae.training.failures import (
    describe,
    first_failure,
    forget_group,
    record_error,
    record_hang,
    start_group,
)
from drorae.training.scratch import scratch_folder
from drorae.training.watchdog import Watchdog
from drorae.training.world import World

__all__ = ["check_worker_counts", "train_on_ray"]

TrainFunction = Callable[..., StageResult]

SILENT_S = 60.0
"""A worker process that answers no health check for so long is ended. Ray's default is 600 s."""
START_TIMEOUT_S = 60.0
ELASTIC_START_TIMEOUT_S = 10.0
"""How long a group waits for its machines before Ray decides again with how many to start. With
60 s an elastic group waited for a machine that was gone (measured 2026-11-21, Ray 2.60)."""
RESIZE_EVERY_S = 30.0
"""How often a smaller group looks for machines that are back."""

log = logging.getLogger(__name__)


def train_on_ray(ctx: StageContext, train: TrainFunction, sections: dict[str, Any]) -> StageResult:
    """Run a training function on `ctx.compute.num_workers` Ray Train workers.

    Args:
        ctx: The stage; its work folder keeps checkpoints, so a restart continues.
        train: Called in every worker as `train(ctx, world, **sections)`; rank 0 writes the output
            files and returns them.
        sections: Configuration sections of the stage.

    Raises:
        ValueError: What a worker raised for a user's mistake, as it was raised.
        Fatal: Another failure that would come again; like the former after the first one.
        RuntimeError: Any other failure after all restarts without a new checkpoint, naming the
            first exception of the group, or the rank that vanished without one.
    """
    files.delete(_result_uri(ctx))
    for name, value in _timeouts(ctx.compute).items():
        os.environ.setdefault(name, value)
    reached, lost = _newest_step(ctx), 0
    for number in itertools.count():
        connect_ray(ctx.compute)
        try:
            _fit(ctx, train, sections, number)
            break
        except (RayActorError, RuntimeError) as error:
            if is_final(error):
                raise
            before, reached = reached, max(reached, _newest_step(ctx))
            lost = lost if reached == before else 0
            if isinstance(error, RayActorError):
                lost += 1
                _after_lost_controller(ctx, lost, error)
            elif reached == before or not ctx.compute.max_failures:
                raise
            else:
                log.warning("%s: goes on, as it reached step %d: %s", ctx.stage, reached, error)
    return from_json(StageResult, files.read_json(_result_uri(ctx)))


def check_worker_counts(compute: Compute, global_batch: int) -> None:
    """Refuse an elastic group that could not share a global batch at one of its sizes.

    Raises:
        ValueError: Names the count that does not divide the batch.
    """
    if not compute.min_workers:
        return
    for count in range(compute.min_workers, compute.num_workers + 1):
        if global_batch % (count * compute.accumulate_steps):
            raise ValueError(
                f"compute.min_workers={compute.min_workers} lets a stage run on {count} workers, "
                f"which cannot share a global batch of {global_batch}: expected a batch that every "
                f"count up to num_workers={compute.num_workers}, times accumulate_steps="
                f"{compute.accumulate_steps}, divides; use another batch, or min_workers=0."
            )


def _timeouts(compute: Compute) -> dict[str, str]:
    """Variables that Ray Train hands on to its controller and workers."""
    start_s = ELASTIC_START_TIMEOUT_S if compute.min_workers else START_TIMEOUT_S
    return {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(min(SILENT_S, compute.hang_timeout_s)),
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(compute.collective_timeout_s),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(start_s),
    }


def _fit(ctx: StageContext, train: TrainFunction, sections: dict[str, Any], restart: int) -> None:
    """One Ray Train run, from start to end or to the failure that ends it."""
    forget_group(_ranks_uri(ctx))
    with scratch_folder() as storage_path:
        trainer = _trainer(ctx, train, sections, restart, storage_path)
        try:
            trainer.fit()
        except RayActorError:
            raise
        except Exception as error:
            _raise_first(ctx, error)


def _trainer(
    ctx: StageContext,
    train: TrainFunction,
    sections: dict[str, Any],
    restart: int,
    storage_path: str,
) -> TorchTrainer:
    compute = ctx.compute
    elastic = (compute.min_workers, compute.num_workers)
    return TorchTrainer(
        _worker,
        train_loop_config={"ctx": ctx, "train": train, "sections": sections},
        torch_config=TorchConfig(
            backend="nccl" if compute.device_type == "cuda" else "gloo",
            timeout_s=max(1, int(compute.collective_timeout_s)),
        ),
        scaling_config=ScalingConfig(
            num_workers=elastic if compute.min_workers else compute.num_workers,
            elastic_resize_monitor_interval_s=RESIZE_EVERY_S,
            use_gpu=compute.use_gpu,
            resources_per_worker=_resources(ctx.workers, compute.use_gpu),
        ),
        run_config=RunConfig(
            name=f"{ctx.stage}-{ctx.key}-a{ctx.attempt}-{restart}",
            storage_path=storage_path,
            # Preemptions and missing machines are no failures of the stage: it waits for others.
            failure_config=FailureConfig(
                max_failures=compute.max_failures,
                max_preemption_failures=-1,
                controller_failure_limit=-1,
            ),
            callbacks=[_EndIfFinal()],
        ),
    )


class _EndIfFinal(UserCallback):
    """Ends the run in place of a restart, in the controller, which then ends the other ranks."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the first exception that would come again; Ray retries no error of a callback."""
        for error in worker_exceptions.values():
            if is_final(error):
                raise error


def _resources(worker: Resources, use_gpu: bool) -> dict[str, float]:
    named = {"CPU": worker.cpus, "memory": worker.memory_bytes}
    return {name: value for name, value in named.items() if value} | (
        {"GPU": worker.gpus} if use_gpu else {}
    )


def _newest_step(ctx: StageContext) -> int:
    """Step of the last checkpoint; -1 without one, or while the store does not tell."""
    try:
        return newest_step(ctx.work_uri)
    except RuntimeError as error:
        log.warning("%s: checkpoints cannot be listed: %s", ctx.stage, error)
        return -1


def _after_lost_controller(ctx: StageContext, lost: int, error: RayActorError) -> None:
    """Let go of what the lost controller started, so that the next one finds the resources free.

    Raises:
        RuntimeError: So many were lost that there is no other restart.
    """
    if lost > ctx.compute.max_failures:
        raise RuntimeError(
            f"{ctx.stage}: the Ray Train controller was lost {lost} times ({error}): "
            "expected it to outlive the training; see the memory of the driver's machine and "
            "Ray's logs, then run again: the stage continues from its last checkpoint."
        ) from error
    log.warning("%s: the Ray Train controller was lost, starting again: %s", ctx.stage, error)
    # Its workers and their placement group end with this driver's connection, not before.
    ray.shutdown()


def _worker(config: dict[str, Any]) -> None:
    """Body of every Ray Train worker."""
    ctx, train = config["ctx"], config["train"]
    context = ray.train.get_context()
    torch.set_num_threads(ctx.compute.threads_per_worker)
    world = World(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        # Ray's answer follows what was asked of Ray, not where the arithmetic runs.
        device=get_device() if ctx.compute.device_type == "cuda" else torch.device("cpu"),
        is_on_one_machine=context.get_local_world_size() == context.get_world_size(),
    )
    folder_uri = start_group(_ranks_uri(ctx), _group_name(), world.rank, world.world_size)
    watchdog = Watchdog(
        folder_uri,
        world.rank,
        world.world_size,
        ctx.compute.hang_timeout_s,
        ctx.compute.collective_timeout_s,
        on_hang=lambda rank, message: record_hang(folder_uri, rank, message),
    )
    try:
        with watchdog:
            result = train(ctx, world, **config["sections"])
    except Exception as error:
        record_error(folder_uri, world.rank, error)
        raise
    if world.is_main:
        files.write_json(_result_uri(ctx), to_json(result))


def _group_name() -> str:
    """The same in all workers of a group and in no other group."""
    placement = get_current_placement_group()
    assert placement is not None, "Ray Train starts its workers in a placement group"
    return placement.id.hex()[:16]


def _result_uri(ctx: StageContext) -> str:
    return files.join(ctx.work_uri, "train_result.json")


def _ranks_uri(ctx: StageContext) -> str:
    return files.join(ctx.work_uri, "ranks")


def _raise_first(ctx: StageContext, error: Exception) -> None:
    """Raise what went wrong first in the last group, caused by a system error if there is one."""
    failure, reports = first_failure(_ranks_uri(ctx))
    failures = getattr(error, "worker_failures", {})
    # A rank's own exception arrives as it was raised; what Ray found out comes in its own classes.
    vanished = [rank for rank, e in failures.items() if type(e).__name__.startswith("WorkerHealth")]
    told = describe(ctx.stage, failure, reports, vanished, error)
    if told.__cause__ is None:
        raise told from error
    raise told
