"""What the sources of a configuration contain: looked at once per run, when it is planned.

Sources are images and pretrained weights that a setting names.

The digests are part of the keys of the stages that read sources, and stand in their manifests. The
list of files behind a digest is kept at <workspace>/sources/<digest>, 24 bytes a file (31 MB for
ImageNet), so that a later plan can say what changed.
"""

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from drorae.data.fingerprint import Fingerprint, fingerprint, unseen
from drorae.store import files
from drorae.store.manifest import Manifest
from drorae.store.workspace import Workspace
from pipelines import stages

Sources = Mapping[str, Fingerprint]
"""What each source contains, by the path of its setting, such as `shard.source`."""


def look(full: Any, built: Sequence[Manifest], *, reads_only: bool = False) -> Sources:
    """Look at every source that a configuration names.

    A source that is not here (deleted after sharding, or on the disks of a cluster) counts as it
    was when it was last used, else by its address alone.

    Args:
        full: The configuration.
        built: Manifests of the workspace, the latest last.
        reads_only: Nothing will be built: take sources as they were when they were last used,
            which costs nothing; relative paths are looked at, since they may mean another folder.

    Raises:
        ValueError: An unknown asset.
        RuntimeError: An object store refused or did not answer.
    """
    found: dict[str, Fingerprint] = {}
    for path, source in _named(full):
        known = _last_used(path, source, built)
        if reads_only and known and (":" in source or os.path.isabs(source)):
            found[path] = known
            continue
        try:
            found[path] = fingerprint(source, reads_all=not path.startswith("shard."))
        except FileNotFoundError:
            found[path] = known or unseen(source)
    return found


def keep(sources: Iterable[Fingerprint], workspace: Workspace) -> None:
    """Write the lists of files into the workspace, where they are not there yet."""
    for found in sources:
        uri = _list_uri(found.digest, workspace)
        if len(found.rows) and not files.exists(uri):
            files.write_bytes(uri, found.encode())


def describe_change(
    path: str, before: str | None, now: Fingerprint, workspace: Workspace
) -> str | None:
    """Return `source changed: 12 files added, 1 removed, 3 changed`; None if it did not.

    Args:
        path: Path of the setting.
        before: Digest when it was last used; None if it was not.
        now: What it contains now.
        workspace: Where lists of files are kept.
    """
    if before is None or before == now.digest or now.is_unseen:
        return None
    name = path.removeprefix("shard.")
    try:
        data = files.read_bytes(_list_uri(before, workspace))
    except FileNotFoundError:
        return f"{name} changed"
    return f"{name} changed: {now.since(Fingerprint.decode(before, data))}"


def _named(full: Any) -> list[tuple[str, str]]:
    """Setting and address of every source that is given."""
    given = [
        (path, stages.setting(full, path))
        for stage in stages.enabled_stages(full, stages.STAGES)
        for path in stage.sources(full)
    ]
    return [(path, source) for path, source in dict(given).items() if source]


def _last_used(path: str, source: str, built: Sequence[Manifest]) -> Fingerprint | None:
    for manifest in reversed(built):
        digest = manifest.config.get(stages.SOURCES, {}).get(path)
        if digest and _setting_json(manifest.config, path) == source:
            return Fingerprint.decode(digest, b"")
    return None


def _setting_json(config: Any, path: str) -> Any:
    return functools.reduce(lambda json, name: json[name], path.split("."), config)


def _list_uri(digest: str, workspace: Workspace) -> str:
    return files.join(workspace.uri, "sources", digest.replace(":", "-"))
