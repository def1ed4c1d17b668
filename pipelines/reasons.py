"""Why a stage has no output yet, and how long it took before: a comparison with earlier outputs."""

from collections.abc import Iterator, Sequence
from typing import Any

from drorae.store.manifest import Manifest
from drorae.store.workspace import Workspace
from pipelines import stages
from pipelines.sources import Sources, describe_change

MAX_CHANGES_SHOWN = 4


def last_wall_s(config: dict[str, Any], earlier: Sequence[Manifest]) -> float | None:
    """Return how long the last build of a similar configuration took; None if there is none."""
    similar = [m for m in earlier if len(_changes(m.config, config)) <= MAX_CHANGES_SHOWN]
    return similar[-1].wall_s if similar else None


def why_missing(
    stage: stages.Stage,
    config: dict[str, Any],
    sources: Sources,
    workspace: Workspace,
    earlier: Sequence[Manifest],
) -> str:
    """Return what differs from the latest output of a stage, or that there is none.

    Args:
        stage: The stage.
        config: Its part of the configuration, as JSON.
        sources: What its sources contain now.
        workspace: Where the lists of files of earlier sources are kept.
        earlier: Manifests of its outputs, the latest last.
    """
    absent = [path for path, found in sources.items() if found.is_unseen]
    if absent:
        return f"{', '.join(absent)} cannot be seen from here; a run needs it"
    if not earlier:
        return "never built here"
    last = earlier[-1]
    if last.version != str(stage.version):
        return f"stage version {last.version} -> {stage.version}"
    before = {name: value for name, value in last.config.items() if name != stages.SOURCES}
    changes = [*_source_changes(sources, workspace, last)]
    changes += [f"{path} {old!r} -> {new!r}" for path, old, new in _changes(before, config)]
    if not changes:
        return "an input changed"
    more = (
        f" and {len(changes) - MAX_CHANGES_SHOWN} more" if len(changes) > MAX_CHANGES_SHOWN else ""
    )
    return ", ".join(changes[:MAX_CHANGES_SHOWN]) + more


def _source_changes(sources: Sources, workspace: Workspace, last: Manifest) -> Iterator[str]:
    digests = last.config.get(stages.SOURCES, {})
    for path, now in sources.items():
        change = describe_change(path, digests.get(path), now, workspace)
        if change:
            yield change


def _changes(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        return [
            change
            for name in names
            for change in _changes(old.get(name), new.get(name), f"{path}.{name}".lstrip("."))
        ]
    return [] if old == new else [(path, old, new)]
