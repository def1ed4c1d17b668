"""The stage table: the whole graph of the product on one screen.

A stage names what it needs, which sections of the configuration it uses (they and the keys of its
inputs make its key), and the function that does the work. Order, deployments, `drorae plan` and the
flow all read this table. Raise a stage's `version` when its code changes what it writes.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from drorae.config import ACCELERATED, Resources, to_json
from drorae.store.keys import stage_key

DRIVER = Resources(cpus=0.0, memory_bytes=2 << 30)
"""A stage's own process: it hands out work, waits, and writes small files. It needs no GPU, and
runs on a head that declares neither GPUs nor CPUs."""
PIXELS = Resources(cpus=1.0)
"""An actor that reads and writes pictures."""


def _always(full: Any) -> bool:
    return True


def _with_control(full: Any) -> bool:
    return bool(full.evaluate.control)


def _with_guide(full: Any) -> bool:
    return "autoguidance" in full.evaluate.guidances


def _is_trained(full: Any) -> bool:
    return not full.decoder.released


def _uses_imported_stats(full: Any) -> bool:
    return full.latents.stats == "imported"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One node of the graph.

    Args:
        name: Name in paths, on the command line and as a deployment.
        needs: Stages whose outputs it reads.
        sections: Attributes of the full configuration that it receives, and that its key covers.
        entry: `module:function` called as `function(ctx, **sections)`.
        version: Part of the key.
        enabled: Whether this configuration has the stage at all.
        needs_if: Needs that only some configurations have: a name in `needs`, and when it counts.
        uses_ray: Whether a local Ray has to be up for it when no cluster is given.
        driver: What its own process takes of a cluster.
        workers: What each of its training workers or actors takes.
    """

    name: str
    needs: tuple[str, ...]
    sections: tuple[str, ...]
    entry: str
    version: int = 1
    enabled: Callable[[Any], bool] = _always
    needs_if: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    uses_ray: bool = True
    driver: Resources = DRIVER
    workers: Resources = ACCELERATED


STAGES: tuple[Stage, ...] = (
    Stage(
        name="shard",
        needs=(),
        sections=("shard",),
        entry="drorae.data.sharding:run_shard",
        version=2,
        workers=PIXELS,
    ),
    Stage(
        name="decoder",
        needs=("shard",),
        sections=("seed", "encoder", "decoder"),
        entry="drorae.training.stages:run_decoder",
        version=2,
        needs_if={"shard": _is_trained},
    ),
    Stage(
        name="fusion",
        needs=("shard", "decoder"),
        sections=("seed", "encoder", "fusion"),
        entry="drorae.training.stages:run_fusion",
        version=2,
    ),
    Stage(
        name="finetune",
        needs=("shard", "decoder", "fusion"),
        sections=("seed", "encoder", "finetune"),
        entry="drorae.training.stages:run_finetune",
        version=2,
    ),
    Stage(
        name="control",
        needs=("shard", "decoder"),
        sections=("seed", "encoder", "control"),
        entry="drorae.training.stages:run_control",
        version=2,
        enabled=_with_control,
    ),
    Stage(
        name="latents",
        needs=("shard", "decoder", "fusion"),
        sections=("encoder", "latents"),
        entry="drorae.data.latents:run_latents",
        version=2,
        needs_if={"decoder": _uses_imported_stats},
    ),
    Stage(
        name="diffusion",
        needs=("latents",),
        sections=("seed", "diffusion"),
        entry="drorae.training.stages:run_diffusion",
        version=2,
    ),
    Stage(
        name="guide",
        needs=("latents",),
        sections=("seed", "guide"),
        entry="drorae.training.stages:run_guide",
        version=2,
        enabled=_with_guide,
    ),
    Stage(
        name="evaluate",
        needs=(
            *("shard", "decoder", "fusion", "finetune", "control"),
            *("latents", "diffusion", "guide"),
        ),
        sections=("seed", "encoder", "evaluate"),
        entry="drorae.evaluation.stages:run_evaluate",
        version=2,
    ),
    Stage(
        name="report",
        needs=(
            *("shard", "decoder", "fusion", "finetune", "control"),
            *("latents", "diffusion", "guide", "evaluate"),
        ),
        sections=("recipe", "report"),
        entry="drorae.evaluation.stages:run_report",
        uses_ray=False,
    ),
)


def topological(table: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return the stages, each after those that it needs; else in table order.

    Raises:
        ValueError: If a name occurs twice, a need is unknown, or the needs form a cycle.
    """
    names = [stage.name for stage in table]
    if len(set(names)) != len(names):
        raise ValueError(f"stage names {names} are not unique; every stage needs its own name.")
    for stage in table:
        unknown = sorted(set(stage.needs) - set(names))
        if unknown:
            raise ValueError(f"stage {stage.name!r} needs {unknown}, not in the table {names}.")
    placed: dict[str, Stage] = {}
    while len(placed) < len(table):
        ready = [s for s in table if s.name not in placed and set(s.needs) <= placed.keys()]
        if not ready:
            cycle = [name for name in names if name not in placed]
            raise ValueError(f"the needs of {cycle} form a cycle; remove one of the edges.")
        placed[ready[0].name] = ready[0]
    return tuple(placed.values())


def enabled_stages(full: Any, table: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return the stages that this configuration has, in topological order."""
    return tuple(stage for stage in topological(table) if stage.enabled(full))


def needs_of(full: Any, stage: Stage, enabled: Mapping[str, str]) -> tuple[str, ...]:
    """Return the needs that a stage has in this configuration, in table order."""
    return tuple(
        name for name in stage.needs if name in enabled and stage.needs_if.get(name, _always)(full)
    )


def section_values(full: Any, stage: Stage) -> dict[str, Any]:
    """Return the part of the configuration that a stage receives, by section name."""
    return {name: getattr(full, name) for name in stage.sections}


def section_json(full: Any, stage: Stage) -> dict[str, Any]:
    """Return that part as JSON values, as the manifest records it."""
    return {name: to_json(value) for name, value in section_values(full, stage).items()}


def key_json(full: Any, stage: Stage) -> dict[str, Any]:
    """Return what the key covers of it: a section with a method `for_key` says that itself."""
    values = section_values(full, stage)
    return {
        name: to_json(value.for_key() if hasattr(value, "for_key") else value)
        for name, value in values.items()
    }


def stage_keys(full: Any, table: Sequence[Stage] = STAGES) -> dict[str, str]:
    """Return the key of every enabled stage, in topological order."""
    keys: dict[str, str] = {}
    for stage in enabled_stages(full, table):
        inputs = {name: keys[name] for name in needs_of(full, stage, keys)}
        keys[stage.name] = stage_key(stage.name, stage.version, key_json(full, stage), inputs)
    return keys


def descendants(name: str, table: Sequence[Stage]) -> set[str]:
    """Return the names of all stages that need `name`, directly or not."""
    found: set[str] = set()
    for stage in topological(table):
        if found.intersection(stage.needs) or name in stage.needs:
            found.add(stage.name)
    return found


def chain_length(name: str, table: Sequence[Stage]) -> int:
    """Return the number of stages from `name` to the end; the longest chain gets a slot first."""
    followers = [stage.name for stage in table if name in stage.needs]
    return 1 + max((chain_length(follower, table) for follower in followers), default=0)


def find_stage(name: str, table: Sequence[Stage] = STAGES) -> Stage:
    """Return the stage called `name`.

    Raises:
        ValueError: If there is none; the message lists close matches.
    """
    by_name = {stage.name: stage for stage in table}
    if name not in by_name:
        close = difflib.get_close_matches(name, by_name) or list(by_name)
        raise ValueError(f"unknown stage {name!r}; did you mean {' or '.join(close)}?")
    return by_name[name]
