"""The only place where training meets Ray Train: start workers, join them, return rank 0's result.

A training stage is a function `train(ctx, world, **sections) -> StageResult` that knows no Ray.
Here it is run in every worker of a Ray Train group. Restarts after a lost worker go through Ray's
failure policy; the function then finds its own last checkpoint. Ray's checkpoint store is not used:
a reported checkpoint is registered only at the controller's next poll, and one written in the
second before a crash is lost (measured 2026-11-21, Ray 2.60).
"""

import os
import shutil
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from drorae.config import from_json, to_json
from drorae.data.ray_session import connect_ray
from drorae.store import files
from drorae.store.context import StageContext, StageResult
from drorae.training.world import World

__all__ = ["train_on_ray"]

TrainFunction = Callable[..., StageResult]


def train_on_ray(ctx: StageContext, train: TrainFunction, sections: dict[str, Any]) -> StageResult:
    """Run a training function on `ctx.compute.num_workers` Ray Train workers.

    Args:
        ctx: The stage; its work folder keeps checkpoints, so a restart continues.
        train: Called in every worker as `train(ctx, world, **sections)`; rank 0 writes the output
            files and returns them.
        sections: Configuration sections of the stage.

    Raises:
        ValueError: What a worker raised for a user's mistake, as it was raised.
        RuntimeError: Any other failure after all restarts, naming the first exception of the group.
    """
    compute = ctx.compute
    connect_ray(compute)
    result_uri = files.join(ctx.work_uri, "train_result.json")
    files.delete(result_uri)
    files.delete(_error_uri(ctx))
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    storage_path = tempfile.mkdtemp(prefix="drorae-train-")
    resources = {"CPU": 1.0} | ({"GPU": 1.0} if compute.use_gpu else {})
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"ctx": ctx, "train": train, "sections": sections},
        torch_config=TorchConfig(
            backend="nccl" if compute.use_gpu else "gloo",
            timeout_s=int(timedelta(seconds=compute.collective_timeout_s).total_seconds()),
        ),
        scaling_config=ScalingConfig(
            num_workers=compute.num_workers,
            use_gpu=compute.use_gpu,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=f"{ctx.stage}-{ctx.key}-a{ctx.attempt}",
            storage_path=storage_path,
            failure_config=FailureConfig(max_failures=compute.max_failures),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise _first_error(ctx, error) from error
    finally:
        shutil.rmtree(storage_path, ignore_errors=True)
    return from_json(StageResult, files.read_json(result_uri))


def _worker(config: dict[str, Any]) -> None:
    """Body of every Ray Train worker."""
    ctx, train = config["ctx"], config["train"]
    context = ray.train.get_context()
    torch.set_num_threads(ctx.compute.threads_per_worker)
    world = World(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=get_device(),
    )
    try:
        result = train(ctx, world, **config["sections"])
    except Exception as error:
        _record_error(ctx, world.rank, error)
        raise
    if world.is_main:
        files.write_json(files.join(ctx.work_uri, "train_result.json"), to_json(result))


def _error_uri(ctx: StageContext) -> str:
    return files.join(ctx.work_uri, "train_error.json")


def _record_error(ctx: StageContext, rank: int, error: Exception) -> None:
    """Keep the first error of the group; later ones are mostly its consequences."""
    record = {
        "rank": rank,
        "type": type(error).__name__,
        "message": str(error),
        "trace": traceback.format_exc(),
    }
    files.create_exclusive(_error_uri(ctx), files.encode_json(record))


def _first_error(ctx: StageContext, error: Exception) -> Exception:
    if not files.exists(_error_uri(ctx)):
        return RuntimeError(f"{ctx.stage}: training stopped without an error of its own: {error}")
    record = files.read_json(_error_uri(ctx))
    kinds = {"ValueError": ValueError, "FileNotFoundError": FileNotFoundError}
    kind = kinds.get(record["type"], RuntimeError)
    prefix = "" if kind is not RuntimeError else f"{ctx.stage}, rank {record['rank']}: "
    return kind(f"{prefix}{record['message']}")
