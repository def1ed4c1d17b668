"""`manifest.json`, written last: it commits a stage's output and says where it came from.

No path of the machine is stored, so that a workspace can be moved or copied to another store.
"""

import importlib.metadata
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drorae.config import from_json, to_json
from drorae.store.files import FileEntry

MANIFEST_NAME = "manifest.json"
RECORDED_PACKAGES = (
    "torch",
    "ray",
    "pyarrow",
    "s3fs",
    "mlflow",
    "prefect",
    "torch-fidelity",
    "transformers",
    "numpy",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a committed output holds, and its provenance."""

    stage: str
    """Stage name."""
    key: str
    """Key of this output, from `keys.stage_key`."""
    version: str
    """Version of the stage's meaning, part of the key."""
    config: dict[str, Any]
    """The part of the configuration that the key covers, as JSON."""
    input_keys: dict[str, str]
    """Key of every input, by stage name."""
    files: tuple[FileEntry, ...]
    """Every file of the output, sorted by name."""
    metrics: dict[str, float | None]
    """Final numbers of the stage; None stands for a value that was not finite."""
    seed: int | None
    """Seed of the run; None for a stage that draws nothing."""
    code_digest: str
    """Sha256 of the source files at build time; not part of the key."""
    packages: dict[str, str]
    """Installed version of every recorded package."""
    hardware: dict[str, Any]
    """Processor model, cores, memory in bytes, names of the GPUs."""
    wall_s: float
    """Seconds that the committing attempt took."""
    device_hours: float
    """`wall_s` in hours times the devices in use."""
    attempt: int
    """Which attempt of the stage succeeded, from 1."""
    run_ids: dict[str, str]
    """Ids of the Prefect run, the Ray job and the MLflow run."""
    created_at: str
    """Time of the commit, UTC, ISO 8601."""


class DamagedOutput(RuntimeError):
    """A committed output of which files are missing or changed.

    Args:
        uri: Folder of the output.
        problems: One text per problem; each starts with the file's name.
    """

    def __init__(self, uri: str, problems: Sequence[str]):
        super().__init__(uri, tuple(problems))
        self.uri = uri
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return (
            f"output {self.uri} is damaged: {'; '.join(self.problems)}. Expected the files that "
            f"its "
            f"manifest names; run the stage again, which rebuilds it."
        )


def encode_manifest(manifest: Manifest) -> dict[str, Any]:
    """JSON form of a manifest."""
    return to_json(manifest)


def decode_manifest(data: Any, uri: str) -> Manifest:
    """Manifest from its JSON form.

    Args:
        data: Parsed JSON.
        uri: Folder of the output, for the error.

    Raises:
        DamagedOutput: If fields are missing, unknown or of the wrong type.
    """
    try:
        return from_json(Manifest, data, MANIFEST_NAME)
    except ValueError as error:
        raise DamagedOutput(uri, [f"{MANIFEST_NAME} is not readable ({error})"]) from error


def finite_metrics(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as JSON can hold them: None for what is not finite."""
    return {k: float(v) if math.isfinite(v) else None for k, v in metrics.items()}


def installed_packages() -> dict[str, str]:
    """Version of every recorded package that is installed."""
    versions = {}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_hardware(gpus: Sequence[str] = ()) -> dict[str, Any]:
    """Processor, cores and memory of this machine.

    Args:
        gpus: Names of the GPUs in use; the caller knows them, this package imports no torch.
    """
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": list(gpus),
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # no /proc outside Linux: the architecture has to do
    return platform.processor() or platform.machine()
