"""What the driver of evaluate holds at ImageNet's size, with tasks that only leave their files."""

import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evaluation_fakes import commit

from drorae.config import Compute, Resources
from drorae.data.shard_map import BuildWorker, ShardTask
from drorae.evaluation.job import EvaluateJob
from drorae.evaluation.stages import run_evaluate
from drorae.evaluation.stored import values_uri, write_arrays
from drorae.models.encoder_config import EncoderConfig
from drorae.store.context import StageContext, StageResult

PHOTOS, CLASSES, PX = 50_000, 1000, 256
MODELS = ("rae", "fusion", "finetune", "control")
JOB = EvaluateJob(
    num_val_images=0,
    num_samples=PHOTOS,
    guidances=("unguided", "cfg"),
    chunk_samples=1000,
    bootstrap_replicates=250,  # one block of replicates, as large as with 2,000
    num_grid_images=4,
)
ROW = dict.fromkeys(("fd", "kid", "precision", "recall", "score"), 1.0)


class Leaves:
    """Runs no task: leaves the values and pictures that one would leave."""

    def __init__(self, work_uri: str) -> None:
        self.work_uri = work_uri

    def __call__(
        self, tasks: Sequence[ShardTask], build: BuildWorker, compute: Compute, worker: Resources
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for task in tasks:
            kind = task.payload.get("kind", "measure")
            if kind not in ("measure", "inspect", "real"):
                self.leave(kind, task.payload["start"], task.payload["stop"])
            yield task.name, {"inspect": INSPECTED, "measure": ROW}.get(kind, IDENTIFIED)

    def leave(self, kind: str, start: int, stop: int) -> None:
        ids = np.arange(start, stop)
        if kind == "reconstruct":
            arrays = {"labels": ids % CLASSES}
            arrays |= {f"values/{m}": np.ones((len(ids), 3), np.float32) for m in MODELS}
            shown = np.zeros(((ids < 4).sum(), 3, PX, PX), np.uint8)
            arrays |= {f"shown/{name}": shown for name in ("photo", *MODELS)}
            write_arrays(values_uri(self.work_uri, "photos", start), **arrays)
            return
        index = ids[(ids % CLASSES < 10) & (ids < 4 * CLASSES)]
        images = np.zeros((len(index), 3, PX, PX), np.uint8)
        write_arrays(values_uri(self.work_uri, kind, start), index=index, images=images)


INSPECTED = {"report": {}, "has_routing": False}
IDENTIFIED = {"feature_identity": "made up"}


def write_counts(ctx: StageContext) -> StageResult:
    rows = {"rows": PHOTOS, "shards": [PHOTOS]}
    counts = {"train": rows, "val": rows, "class_names": [], "resolution_px": PX}
    model = {"model": {"num_classes": CLASSES}}
    return StageResult(
        files=[ctx.put_json("counts.json", counts), ctx.put_json("config.json", model)]
    )


def test_the_driver_holds_less_than_300_mb_for_50_000_photos_and_samples(tmp_path: Path) -> None:
    names = ("shard", "decoder", "finetune", "control", "diffusion")
    ctx = StageContext(
        stage="evaluate",
        key="k",
        output_uri=str(tmp_path / "evaluate"),
        inputs={name: commit(tmp_path, name, write_counts) for name in names},
    )
    tracemalloc.start()
    try:
        result = run_evaluate(
            ctx, seed=0, encoder=EncoderConfig(), evaluate=JOB, executor=Leaves(ctx.work_uri)
        )
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert {"metrics.json", "per_image.parquet"} <= {entry.name for entry in result.files}
    assert peak_bytes < 300 * 2**20
