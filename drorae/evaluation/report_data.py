"""What the report shows, gathered from finished stages."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drorae.store import files
from drorae.store.workspace import StageOutput

__all__ = ["Curve", "ReportData", "StageRow", "collect"]

LOG_NAME = "train_log.jsonl"
MANY_DIGITS = 12
UNPLOTTED = ("learning_rate", "/lr", "_per_s", "_bytes", "_s", "epoch", "images_seen", "share")


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One logged quantity of one stage."""

    stage: str
    name: str
    steps: list[int]
    values: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRow:
    """Provenance of one stage, from its manifest."""

    stage: str
    key: str
    seed: str
    code_digest: str
    wall_s: float
    device_hours: float
    attempt: int
    created_at: str
    hardware: dict[str, Any]
    packages: dict[str, str]
    weights: list[tuple[str, int, str]]
    """File name, bytes and sha256 of every weights file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportData:
    """Everything the page shows."""

    recipe: str
    metrics: dict[str, Any]
    """metrics.json of the evaluate stage."""
    pictures: dict[str, bytes]
    """PNG files of the evaluate stage by name without folder and suffix."""
    curves: list[Curve]
    stages: list[StageRow]
    counts: dict[str, Any]
    """counts.json of the shard stage."""


def collect(inputs: Mapping[str, StageOutput], *, recipe: str, max_points: int) -> ReportData:
    """Read all that the page needs.

    Args:
        inputs: Finished stages by name; `evaluate` must be among them.
        recipe: Name of the recipe.
        max_points: Points kept per curve.

    Raises:
        ValueError: If `evaluate` is missing.
    """
    if "evaluate" not in inputs:
        raise ValueError(
            f"report got the stages {sorted(inputs)}: expected evaluate among them; run that "
            "stage first."
        )
    evaluate = inputs["evaluate"]
    shard = inputs.get("shard")
    curves: list[Curve] = []
    for stage, output in inputs.items():
        if LOG_NAME in output.names():
            text = files.read_bytes(output.uri_of(LOG_NAME)).decode()
            curves += parse_log(stage, text, max_points)
    return ReportData(
        recipe=recipe,
        metrics=evaluate.read_json("metrics.json"),
        pictures={
            name.rsplit("/", 1)[-1].removesuffix(".png"): files.read_bytes(evaluate.uri_of(name))
            for name in evaluate.names("grids/", ".png")
        },
        curves=curves,
        stages=[stage_row(output.manifest) for output in inputs.values()],
        counts=shard.read_json("counts.json") if shard is not None else {},
    )


def parse_log(stage: str, text: str, max_points: int) -> list[Curve]:
    """Curves of one `train_log.jsonl`; of a step logged twice (restart) the last counts."""
    series: dict[str, dict[int, float]] = {}
    for line in text.splitlines():
        if not line.strip():
            continue
        record = json.loads(line)
        step = int(record.get("step", 0))
        for name, value in record.items():
            if name != "step" and is_plotted(name) and isinstance(value, int | float):
                series.setdefault(name, {})[step] = float(value)
    curves = []
    for name, points in series.items():
        steps = thin(sorted(points), max_points)
        curves.append(Curve(stage=stage, name=name, steps=steps, values=[points[s] for s in steps]))
    return curves


def is_plotted(name: str) -> bool:
    """Whether a logged name is a training curve rather than speed or bookkeeping."""
    return not any(name.endswith(end) or name == end.strip("/") for end in UNPLOTTED)


def thin(items: list[int], count: int) -> list[int]:
    """At most `count` items, evenly spread, both ends kept."""
    if len(items) <= count:
        return items
    last = len(items) - 1
    return [items[round(i * last / (count - 1))] for i in range(count)]


def stage_row(manifest: Any) -> StageRow:
    """The provenance line of one manifest."""
    return StageRow(
        stage=manifest.stage,
        key=manifest.key,
        seed="-" if manifest.seed is None else str(manifest.seed),
        code_digest=str(manifest.code_digest)[:MANY_DIGITS],
        wall_s=float(manifest.wall_s),
        device_hours=float(manifest.device_hours),
        attempt=int(manifest.attempt),
        created_at=str(manifest.created_at),
        hardware=dict(manifest.hardware),
        packages={k: str(v) for k, v in dict(manifest.packages).items()},
        weights=[
            (f.name, f.size_bytes, f.sha256)
            for f in manifest.files
            if f.name.endswith(".safetensors")
        ],
    )
