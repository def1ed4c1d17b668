"""One Ray Data task a shard, with done markers: a rerun redoes only what is missing.

Ray Data's own writers name files at random and may merge blocks, so workers write their files
themselves, atomically and under fixed names, and return a small JSON result. The marker
`done/<name>.json` is written after the worker's files; it holds that result. A rerun reads them in
bundles (`known_results.py`).
"""

import functools
import json
import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

from drorae.config import Compute, Resources
from drorae.data.known_results import KnownResults
from drorae.store import files

PLAIN = Resources()

Progress = Callable[[int, int], None]
"""Called with (work done, work in all), in the unit of `ShardTask.size`."""


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One unit of work."""

    name: str
    """Unique, deterministic name; also that of the done marker. No slashes."""
    payload: dict[str, Any]
    """JSON values that the worker needs."""
    size: int = 1
    """How much work it is, in a unit of the stage's; only progress depends on it."""


@runtime_checkable
class ShardWorker(Protocol):
    """What runs in an actor: built once, called once a shard."""

    def __call__(self, task: ShardTask) -> dict[str, Any]:
        """Do the work, write files, return a JSON result."""
        ...


BuildWorker = Callable[[], ShardWorker]
"""Makes the worker, in the actor; has to be picklable."""

Executor = Callable[
    [Sequence[ShardTask], BuildWorker, Compute, Resources], Iterable[tuple[str, dict[str, Any]]]
]
"""Runs tasks somewhere and yields (name, result) as they finish. Called with the tasks, what makes
the worker of an actor, the number of actors in `Compute`, and what one actor takes."""


def map_shards(
    tasks: Sequence[ShardTask],
    build_worker: BuildWorker,
    *,
    work_uri: str,
    compute: Compute,
    on_progress: Progress | None = None,
    worker: Resources = PLAIN,
    executor: Executor | None = None,
) -> list[dict[str, Any]]:
    """Run a worker over all tasks that have no done marker yet.

    Args:
        tasks: Work units with unique names.
        build_worker: Makes the worker, once in each actor.
        work_uri: Folder of this stage's work files; markers go below it.
        compute: Number of actors.
        on_progress: Called with the work that is finished, earlier attempts included.
        worker: What one actor takes of the cluster.
        executor: Who runs the tasks; Ray Data unless given.

    Returns:
        Results in the order of the tasks.

    Raises:
        ValueError: Two tasks share a name.
        RuntimeError: A task returned nothing.
    """
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        raise ValueError(f"shard names repeat in {names[:8]}: expected one name a shard.")
    done_uri = files.join(work_uri, "done")
    known = KnownResults(done_uri)
    results = known.read(set(names))
    missing = [task for task in tasks if task.name not in results]
    sizes = {task.name: task.size for task in tasks}
    total, done = sum(sizes.values()), sum(sizes[name] for name in results)
    report = on_progress or (lambda done, total: None)
    report(done, total)
    if missing:
        run = executor or run_on_ray
        build_marking = functools.partial(_MarkingWorker, build_worker, done_uri)
        for name, result in run(missing, build_marking, compute, worker):
            results[name] = result
            known.add(name, result)
            done += sizes[name]
            report(done, total)
        known.write()
    lost = [name for name in names if name not in results]
    if lost:
        raise RuntimeError(
            f"{len(lost)} shards returned no result, first {lost[0]!r}: run the stage again."
        )
    return [results[name] for name in names]


class _MarkingWorker:
    """Runs the inner worker, then writes the marker."""

    def __init__(self, build_worker: BuildWorker, done_uri: str) -> None:
        self._worker = build_worker()
        self._done_uri = done_uri

    def __call__(self, task: ShardTask) -> dict[str, Any]:
        result = self._worker(task)
        files.write_json(files.join(self._done_uri, f"{task.name}.json"), result)
        return result


def run_in_process(
    tasks: Sequence[ShardTask], build_worker: BuildWorker, compute: Compute, worker: Resources
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run tasks one by one in this process (an `Executor`): no Ray, for tests and debugging."""
    run = build_worker()
    for task in tasks:
        yield task.name, run(task)


def run_on_ray(
    tasks: Sequence[ShardTask], build_worker: BuildWorker, compute: Compute, worker: Resources
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run tasks on a Ray Data actor pool, one block a task (an `Executor`).

    The pool is as large as `num_actors` says, and works with fewer while places are missing: one
    actor is enough. An actor takes one task at a time, so that the last ones end together.

    Raises:
        ValueError: As a task raised it; likewise FileNotFoundError.
        RuntimeError: Any other error of a task.
    """
    # Ray starts slowly and a process that only reads shards never needs it.
    import ray.data

    from drorae.data.ray_session import connect_ray

    connect_ray(compute)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.actor_pool_util_upscaling_threshold = 0.9  # with one task an actor, 1 is the most
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # progress is told by `on_progress`
    rows = [{"name": task.name, "payload": json.dumps(task.payload)} for task in tasks]
    gpus = worker.gpus if compute.use_gpu else 0.0
    actors = min(num_actors(compute, worker, ray.cluster_resources()), len(tasks))
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        cast(Any, _RayRow),
        fn_constructor_args=(build_worker, compute.threads_per_worker),
        compute=ray.data.ActorPoolStrategy(
            min_size=1, initial_size=actors, max_size=actors, max_tasks_in_flight_per_actor=1
        ),
        num_cpus=worker.cpus,
        num_gpus=gpus or None,
        memory=worker.memory_bytes or None,
    )
    for row in results.iter_rows():
        if row["error"]:
            raise _as_raised(row["name"], json.loads(row["error"]))
        yield row["name"], json.loads(row["result"])


def num_actors(compute: Compute, worker: Resources, available: Mapping[str, float]) -> int:
    """Actors that work at the same time: one a place on the GPUs of the cluster, else data_actors.

    Args:
        compute: Whether GPUs are asked for, and the number of actors without.
        worker: What one actor takes.
        available: Resources of the whole cluster by Ray's names; machines that it lacks now do not
            count.
    """
    if not (compute.use_gpu and worker.gpus):
        return compute.data_actors
    return max(1, int(available.get("GPU", 0.0) / worker.gpus))


def _as_raised(name: str, error: dict[str, str]) -> Exception:
    kinds = {"ValueError": ValueError, "FileNotFoundError": FileNotFoundError}
    kind = kinds.get(error["type"], RuntimeError)
    again = kind(f"shard {name} failed: {error['message']}")
    again.add_note(error["trace"])
    return again


class _RayRow:
    """Adapter of a worker to rows of text: Arrow must not guess a schema from payloads.

    Errors travel as rows too, because Ray Data buries an exception of a task in its own advice. The
    worker is built at its first row, so that what goes wrong there is told the same way.
    """

    def __init__(self, build_worker: BuildWorker, threads: int) -> None:
        self._build = build_worker
        self._threads = threads

    @functools.cached_property
    def _worker(self) -> ShardWorker:
        import torch  # heavy: only in the actor

        torch.set_num_threads(self._threads)
        return self._build()

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        name = str(row["name"])
        try:
            result = self._worker(ShardTask(name, json.loads(row["payload"])))
        except Exception as error:
            record = {"type": type(error).__name__, "message": str(error)}
            record["trace"] = traceback.format_exc()
            return {"name": name, "result": "", "error": json.dumps(record)}
        return {"name": name, "result": json.dumps(result), "error": ""}
