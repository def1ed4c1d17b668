"""What must be there before services start: disk space, assets, the image source.

Without this a run would say so after minutes, or hours when a late stage lacks its asset.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drorae.config import flatten
from pipelines import session, stages
from pipelines.plan import RunPlan

RANDOM_WEIGHTS = "random"
"""Source of a critic without pretrained weights."""
NO_FILES = ("shard.source", "shard.val_source", "encoder.source")
"""Settings that may also name a folder, or what a hub knows."""
MIN_FREE_BYTES = 64 << 20
"""Less than this holds the run's databases and logs (5 MB, smoke, 2026-11-22) and little else."""


def check_machine(plan: RunPlan, root: Path) -> None:
    """Raise unless this machine has what the stages that must run will ask for.

    On a cluster the stages run elsewhere, so only the disk is checked.

    Args:
        plan: What will run.
        root: Folder of the run's databases and logs.

    Raises:
        FileNotFoundError: An asset, a file of weights or of labels, or the source is missing.
        ValueError: An unknown asset.
        RuntimeError: The disk is full.
    """
    free_bytes = shutil.disk_usage(root).free
    if free_bytes < MIN_FREE_BYTES:
        raise RuntimeError(
            f"no space left for {root}: {free_bytes / 1e6:.1f} MB free, expected at least "
            f"{MIN_FREE_BYTES / 1e6:.0f} MB; free some or choose another workspace, then run again."
        )
    if session.cluster_address() is None:
        # Reads images with pyarrow and Pillow, which `drorae --help` should not wait for.
        from drorae.data.readers.source import check_source

        for source in sorted(set(_sources(plan))):
            check_source(source)
        _check_files(plan)


def _check_files(plan: RunPlan) -> None:
    """Raise for a file of weights or labels that is not there; a hub may know an encoder."""
    for stage in plan.stages_to_run():
        for path in stage.sources(plan.full):
            value = stages.setting(plan.full, path)
            if not value or path in NO_FILES or _has_scheme(value) or value == RANDOM_WEIGHTS:
                continue
            if not os.path.isfile(value):
                kind = "labels" if path.startswith("shard.") else "weights"
                raise FileNotFoundError(
                    f"{path}={value!r} does not exist, but stage {stage.name} reads it: expected a "
                    f"file of {kind}. Correct it with --set {path}=FILE."
                )


def _has_scheme(value: str) -> bool:
    return value.startswith("asset:") or "://" in value


def _sources(plan: RunPlan) -> Iterator[str]:
    """Yield the image sources and assets that the stages to run will open."""
    for step in plan.steps:
        if step.must_run:
            stage = stages.find_stage(step.stage, stages.STAGES)
            yield from _named(stages.section_values(plan.full, stage))


def _named(sections: dict[str, Any]) -> Iterator[str]:
    fields: dict[str, Any] = {}
    for name, value in sections.items():
        if not isinstance(value, str | int | float | None):
            fields |= flatten(value, f"{name}.")
    for path, value in fields.items():
        section, _, name = path.rpartition(".")
        if not isinstance(value, str):
            continue
        if path in ("shard.source", "shard.val_source") or value.startswith("asset:"):
            yield value
        elif name == "lpips_net" and fields.get(f"{section}.lpips_weight", 1):
            yield f"asset:lpips-{value}"
        elif name == "feature_extractor" and value == "efficientnet-lite0":
            yield f"asset:{value}"
