"""The stage table: the whole graph of the product on one screen.

A stage names what it needs, which sections of the configuration it uses (they and the keys of its
inputs make its key), and the function that does the work. Order, deployments, `drorae plan` and the
flow all read this table. Raise a stage's `version` when its code changes what it writes.
"""

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from drorae.config import ACCELERATED, Resources, to_json
from drorae.data.fingerprint import Fingerprint
from drorae.recipes.data_check import (
    Counted,
    Listed,
    check_classes,
    check_evaluation,
    check_validation,
    reading_notes,
)
from drorae.store.keys import stage_key
from drorae.store.workspace import StageOutput

Check = Callable[[Any, Counted | None, str], None]
"""Called with the full configuration, an output (None while it is not there) and the name of the
stage that asks; raises ValueError."""

SOURCES = "sources"
"""Name under which a manifest's configuration holds the digests of the sources."""

DRIVER = Resources(cpus=0.0, memory_bytes=2 << 30)
"""A stage's own process: it hands out work, waits, and writes small files. It needs no GPU, and
runs on a head that declares neither GPUs nor CPUs. Evaluate's holds 1.0 GiB with 50,000 photos,
most of it libraries, and Ray Data comes on top."""
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


def _no_sources(full: Any) -> tuple[str, ...]:
    return ()


def _tokenizer_sources(full: Any, section: str) -> tuple[str, ...]:
    has_critic = getattr(full, section).train.adversarial.weight > 0
    critic = (f"{section}.train.adversarial.discriminator.source",) if has_critic else ()
    return ("encoder.source", *critic)


def _measure_sources(full: Any) -> tuple[str, ...]:
    has_file = full.evaluate.feature_extractor == "inception-v3"
    return ("encoder.source", *(("evaluate.inception_weights_path",) if has_file else ()))


def _no_notes(output: StageOutput) -> list[str]:
    return []


def _check_trained(full: Any, shards: Counted | None, stage: str) -> None:
    if _is_trained(full):
        check_validation(full, shards, stage)


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
        sources: Settings that name images or weights, such as `shard.source`: the key covers what
            they contain, not where they lie.
        checks: What it asks of outputs, by the stage that makes them (a need or not): checked when
            a run is planned, and as soon as that output is made.
        notes: Lines about its output that the user should see.
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
    sources: Callable[[Any], tuple[str, ...]] = _no_sources
    checks: Mapping[str, Check] = field(default_factory=dict)
    notes: Callable[[StageOutput], list[str]] = _no_notes


STAGES: tuple[Stage, ...] = (
    Stage(
        name="shard",
        needs=(),
        sections=("shard",),
        entry="drorae.data.sharding:run_shard",
        version=3,
        workers=PIXELS,
        sources=lambda full: (
            *("shard.source", "shard.val_source"),
            *("shard.label_file", "shard.val_label_file"),
        ),
        notes=reading_notes,
    ),
    Stage(
        name="decoder",
        needs=("shard",),
        sections=("seed", "encoder", "decoder"),
        entry="drorae.training.stages:run_decoder",
        version=2,
        sources=lambda full: _tokenizer_sources(full, "decoder"),
        checks={"shard": _check_trained},
        needs_if={"shard": _is_trained},
    ),
    Stage(
        name="fusion",
        needs=("shard", "decoder"),
        sections=("seed", "encoder", "fusion"),
        entry="drorae.training.stages:run_fusion",
        version=2,
        sources=lambda full: _tokenizer_sources(full, "fusion"),
        checks={"shard": check_validation},
    ),
    Stage(
        name="finetune",
        needs=("shard", "decoder", "fusion"),
        sections=("seed", "encoder", "finetune"),
        entry="drorae.training.stages:run_finetune",
        version=2,
        sources=lambda full: _tokenizer_sources(full, "finetune"),
        checks={"shard": check_validation},
    ),
    Stage(
        name="control",
        needs=("shard", "decoder"),
        sections=("seed", "encoder", "control"),
        entry="drorae.training.stages:run_control",
        version=2,
        sources=lambda full: _tokenizer_sources(full, "control"),
        checks={"shard": check_validation},
        enabled=_with_control,
    ),
    Stage(
        name="latents",
        needs=("shard", "decoder", "fusion"),
        sections=("encoder", "latents"),
        entry="drorae.data.latents:run_latents",
        version=2,
        sources=lambda full: ("encoder.source",),
        needs_if={"decoder": _uses_imported_stats},
    ),
    Stage(
        name="diffusion",
        needs=("latents",),
        sections=("seed", "diffusion"),
        entry="drorae.training.stages:run_diffusion",
        version=2,
        checks={"shard": check_classes},
    ),
    Stage(
        name="guide",
        needs=("latents",),
        sections=("seed", "guide"),
        entry="drorae.training.stages:run_guide",
        version=2,
        checks={"shard": check_classes},
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
        sources=_measure_sources,
        checks={"shard": check_evaluation},
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


def check_output(full: Any, name: str, output: Counted | None, asking: Sequence[Stage]) -> None:
    """Check the output of stage `name` for the stages that will run.

    Args:
        full: The configuration.
        name: Stage that makes the output.
        output: Its output; None while it is not there, which leaves what the configuration says.
        asking: The stages that will run.

    Raises:
        ValueError: If a stage could not work with it.
    """
    for stage in asking:
        if name in stage.checks:
            stage.checks[name](full, output, stage.name)


def check_listed(full: Any, name: str, asking: Sequence[str], counts: dict[str, Any]) -> None:
    """Check what stage `name` is about to make, by the counts that it knows already.

    Args:
        full: The configuration.
        name: Stage that makes the output.
        asking: Names of the stages that will run.
        counts: What its `counts.json` will hold if nothing is rejected.

    Raises:
        ValueError: If a stage could not work with it.
    """
    listed = Listed(uri=full.shard.source, counts=counts)
    check_output(full, name, listed, [stage for stage in STAGES if stage.name in asking])


def section_values(full: Any, stage: Stage) -> dict[str, Any]:
    """Return the part of the configuration that a stage receives, by section name."""
    return {name: getattr(full, name) for name in stage.sections}


def section_json(full: Any, stage: Stage) -> dict[str, Any]:
    """Return that part as JSON values, as the manifest records it."""
    return {name: to_json(value) for name, value in section_values(full, stage).items()}


def setting(full: Any, path: str) -> Any:
    """Return the value of a setting such as `shard.source`."""
    return functools.reduce(getattr, path.split("."), full)


def source_digests(full: Any, stage: Stage, sources: Mapping[str, Fingerprint]) -> dict[str, str]:
    """Return the digests of the sources that a stage reads, by the path of their setting."""
    return {path: sources[path].digest for path in stage.sources(full) if path in sources}


def key_json(
    full: Any, stage: Stage, sources: Mapping[str, Fingerprint] | None = None
) -> dict[str, Any]:
    """Return what the key covers of it: a section with a method `for_key` says that itself.

    Args:
        full: The configuration.
        stage: The stage.
        sources: What its sources contain, by the path of their setting; a source that is not there
            counts by its address.
    """
    values = section_values(full, stage)
    covered = {
        name: to_json(value.for_key() if hasattr(value, "for_key") else value)
        for name, value in values.items()
    }
    for path, digest in source_digests(full, stage, sources or {}).items():
        *sections, name = path.split(".")
        inside = functools.reduce(lambda json, key: json.get(key, {}), sections, covered)
        if name in inside:  # an imported decoder's key leaves its training out
            inside[name] = digest
    return covered


def stage_keys(
    full: Any,
    table: Sequence[Stage] = STAGES,
    sources: Mapping[str, Fingerprint] | None = None,
) -> dict[str, str]:
    """Return the key of every enabled stage, in topological order; `sources` as in `key_json`."""
    keys: dict[str, str] = {}
    for stage in enabled_stages(full, table):
        inputs = {name: keys[name] for name in needs_of(full, stage, keys)}
        covered = key_json(full, stage, sources)
        keys[stage.name] = stage_key(stage.name, stage.version, covered, inputs)
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
