"""Driver of the placement test: runs work on the cluster of RAY_ADDRESS, writes where it ran."""

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from drorae.config import Compute, Resources, from_json
from drorae.data.ray_session import connect_ray
from drorae.data.shard_map import (
    BuildWorker,
    Executor,
    ShardTask,
    run_in_process,
    run_on_ray,
)
from drorae.evaluation.job import EvaluateJob
from drorae.evaluation.stages import run_evaluate
from drorae.models.encoder_config import EncoderConfig
from drorae.store.context import StageContext, StageResult
from drorae.store.workspace import StageOutput
from drorae.training.ray_worker import train_on_ray
from drorae.training.world import World

COMPUTE = Compute(num_workers=2, threads_per_worker=1, use_gpu=True, device="cpu")


class Place:
    """Says where the worker inside it is."""

    def __init__(self, folder: Path, build_worker: BuildWorker) -> None:
        self.folder = folder
        self.inner = build_worker()

    def __call__(self, task: ShardTask) -> dict[str, Any]:
        result = self.inner(task)
        (self.folder / f"{task.name}.place").write_text(node())
        return result


def node() -> str:
    return ray.get_runtime_context().get_node_id()


def placed_on_ray(
    folder: Path,
    tasks: Sequence[ShardTask],
    build: BuildWorker,
    compute: Compute,
    worker: Resources,
) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from run_on_ray(tasks, functools.partial(Place, folder, build), compute, worker)


def train(ctx: StageContext, world: World, *, folder: str) -> StageResult:
    assert world.device.type == "cpu"
    (Path(folder) / f"rank-{world.rank}.place").write_text(node())
    return StageResult(files=[], metrics={"ranks": float(world.world_size)})


def made(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def places(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.place"))}


def context(folder: Path, stage: str, inputs: dict[str, StageOutput]) -> StageContext:
    return StageContext(
        stage=stage, key="k", output_uri=str(folder / stage), inputs=inputs, compute=COMPUTE
    )


def evaluate(folder: Path, name: str, executor: Executor) -> dict[str, str]:
    """Digests of what it writes."""
    inputs = json.loads((folder / "inputs.json").read_text())
    outputs = {name: from_json(StageOutput, data) for name, data in inputs["outputs"].items()}
    result = run_evaluate(
        context(folder, name, outputs),
        seed=3,
        encoder=from_json(EncoderConfig, inputs["encoder"]),
        evaluate=from_json(EvaluateJob, inputs["evaluate"]),
        executor=executor,
    )
    return {entry.name: entry.sha256 for entry in result.files}


def main(folder: Path) -> None:
    connect_ray(COMPUTE)
    rank_places = made(folder, "rank places")
    trained = train_on_ray(context(folder, "fusion", {}), train, {"folder": str(rank_places)})
    on_ray = functools.partial(placed_on_ray, made(folder, "evaluate places"))
    on_actors = evaluate(folder, "evaluate", on_ray)
    torch.set_num_threads(COMPUTE.threads_per_worker)
    in_process = evaluate(folder, "same", run_in_process)
    nodes = {n["NodeID"]: n["Resources"] for n in ray.nodes() if n["Alive"]}
    found = {
        "driver": node(),
        "head": next(i for i, r in nodes.items() if "node:__internal_head__" in r),
        "declare_gpus": [i for i, r in nodes.items() if r.get("GPU")],
        "ranks": places(rank_places),
        "num_ranks": trained.metrics["ranks"],
        "evaluate": places(folder / "evaluate places"),
        "on_actors": on_actors,
        "in_process": in_process,
    }
    (folder / "found.json").write_text(json.dumps(found))
