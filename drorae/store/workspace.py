"""A workspace: where outputs lie, which of them are complete, and whether they are intact.

<workspace>/stages/<stage>/<key>/manifest.json   committed outputs (no manifest, no output)
<workspace>/stages/<stage>/<key>/_work/          checkpoints and markers of an unfinished attempt
<workspace>/leases/<stage>-<key>.json            who writes an output now
<workspace>/sources/<digest>                     files of a source that a stage has read, hashed
<workspace>/logs/<stage>/<key>/attempt-1.log     logs (in the user's cache for s3://)
"""

import hashlib
import logging
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from drorae.store import errors, files, s3
from drorae.store.files import FileEntry, join
from drorae.store.manifest import MANIFEST_NAME, DamagedOutput, Manifest, decode_manifest
from drorae.store.patience import patience

log = logging.getLogger(__name__)

Verify = Literal["none", "size", "sha256"]
WORK_NAME = "_work"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageOutput:
    """A committed output of a stage."""

    uri: str
    """Folder of the output: local path or s3:// address."""
    manifest: Manifest
    """What it holds."""

    @property
    def key(self) -> str:
        """Key of this output."""
        return self.manifest.key

    def names(self, prefix: str = "", suffix: str = "") -> list[str]:
        """Sorted names of the files that start and end so."""
        names = (entry.name for entry in self.manifest.files)
        return sorted(n for n in names if n.startswith(prefix) and n.endswith(suffix))

    def entry(self, name: str) -> FileEntry:
        """Size and digest of one file.

        Raises:
            FileNotFoundError: If the manifest names no such file.
        """
        for entry in self.manifest.files:
            if entry.name == name:
                return entry
        raise FileNotFoundError(
            f"{name} is no file of output {self.uri}: expected one of {self.names()[:20]}."
        )

    def uri_of(self, name: str) -> str:
        """Address of one file.

        Raises:
            FileNotFoundError: If the manifest names no such file.
        """
        return join(self.uri, self.entry(name).name)

    def local(self, name: str, cache_path: str | Path | None = None) -> Path:
        """Local path of one file: itself, or a copy from S3 that is verified against the manifest.

        Args:
            name: Name in the manifest.
            cache_path: Folder for copies; None is DRORAE_CACHE or ~/.cache/drorae.

        Raises:
            FileNotFoundError: If the manifest names no such file, or the store lacks it.
            RuntimeError: If the copy's sha256 is not the manifest's.
        """
        return files.local_copy(self.uri_of(name), cache_path, self.entry(name).sha256)

    def read_json(self, name: str) -> Any:
        """Parsed JSON file of the output."""
        return files.read_json(self.uri_of(name))


@dataclass(frozen=True, slots=True)
class Workspace:
    """All outputs of one project.

    Args:
        uri: Local folder or s3://bucket/prefix; a local one is made absolute.
    """

    uri: str
    """Absolute local path or s3:// address."""

    def __post_init__(self) -> None:
        """Normalise the address."""
        uri = str(self.uri).removeprefix("file://")
        if not uri or ("://" in uri and not errors.is_s3(uri)):
            raise ValueError(
                f"workspace {self.uri!r} is no address: expected a folder or s3://bucket/prefix."
            )
        if errors.is_s3(uri):
            errors.split(uri)
            uri = uri.rstrip("/")
            if "?versionId=" in uri or "//" in uri.removeprefix("s3://"):
                raise ValueError(
                    f"workspace {self.uri!r} holds ?versionId= or //, which S3 clients read in "
                    "different ways: expected s3://bucket/prefix without them."
                )
        else:
            uri = os.path.abspath(os.path.expanduser(uri))
        object.__setattr__(self, "uri", uri)

    def check(self) -> None:
        """Write and delete a small file, so that a run fails in its first seconds or not at all.

        Raises:
            ValueError: If the workspace is a file.
            FileNotFoundError: If the bucket does not exist.
            RuntimeError: If keys are refused, the endpoint does not answer, or nothing can be
                written.
        """
        if errors.is_s3(self.uri):
            s3.check_bucket(self.uri)
        elif os.path.exists(self.uri) and not os.path.isdir(self.uri):
            raise ValueError(
                f"workspace {self.uri} is a file: expected a folder; choose another path."
            )
        probe = join(self.uri, f".check-{uuid.uuid4().hex[:8]}")
        with patience(0):
            files.write_bytes(probe, b"drorae")
            files.delete(probe)

    def stage_uri(self, stage: str, key: str) -> str:
        """Folder of one output."""
        return join(self.uri, "stages", stage, key)

    def lease_uri(self, stage: str, key: str) -> str:
        """File that says who writes this output."""
        return join(self.uri, "leases", f"{stage}-{key}.json")

    def log_path(self, stage: str, key: str, attempt: int) -> Path:
        """Local file for the log of one attempt; its folder is made."""
        base = Path(self.uri)
        if errors.is_s3(self.uri):
            name = hashlib.sha256(self.uri.encode()).hexdigest()[:12]
            base = files.default_cache_path() / "workspaces" / name
        path = base / "logs" / stage / key / f"attempt-{attempt}.log"
        with errors.clear_errors(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def find(self, stage: str, key: str, verify: Verify = "size") -> StageOutput | None:
        """The committed output of a key, or None.

        Args:
            stage: Stage name.
            key: Its key.
            verify: How its files are checked: not at all, by presence and size (one listing), or by
                reading all of them.

        Raises:
            DamagedOutput: If files are missing or changed; lists each by name.
        """
        uri = self.stage_uri(stage, key)
        try:
            data = files.read_json(join(uri, MANIFEST_NAME))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DamagedOutput(uri, [f"{MANIFEST_NAME} is no JSON"]) from error
        manifest = decode_manifest(data, uri)
        problems = [] if verify == "none" else list(_problems(uri, manifest, verify))
        if problems:
            raise DamagedOutput(uri, problems)
        return StageOutput(uri=uri, manifest=manifest)

    def outputs(self) -> list[Manifest]:
        """Manifests of all committed outputs, by stage and time; unreadable ones are logged.

        Raises:
            FileNotFoundError: If the bucket does not exist; a folder that does not is empty.
        """
        if errors.is_s3(self.uri):
            s3.check_bucket(self.uri)
        found = []
        for stage in files.list_folders(join(self.uri, "stages")):
            for key in files.list_folders(join(self.uri, "stages", stage)):
                try:
                    output = self.find(stage, key, verify="none")
                except DamagedOutput as error:
                    log.warning("%s", error)
                    continue
                if output:
                    found.append(output.manifest)
        return sorted(found, key=lambda m: (m.stage, m.created_at))


def _problems(uri: str, manifest: Manifest, verify: Verify) -> Iterator[str]:
    sizes = files.list_sizes(uri)
    for entry in manifest.files:
        found = sizes.get(entry.name)
        if found is None:
            yield f"{entry.name} is missing"
        elif found != entry.size_bytes:
            yield f"{entry.name} has size {found}, manifest says {entry.size_bytes}"
        elif verify == "sha256" and files.sha256_of(join(uri, entry.name)) != entry.sha256:
            yield f"{entry.name}: sha256 differs"
