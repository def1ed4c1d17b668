"""Stage `shard`: raw images of any source become shards of pictures, train and val.

Steps: list candidates; choose by hash; check what was chosen (Ray Data, one task a chunk of
neighbours); choose again until every chosen one is good; write the shards (Ray Data, one task a
shard). The bytes depend on the source and on ShardJob only. With a cap, files that the cap leaves
out are neither read nor checked.

Growth: the driver holds about 250 bytes an image. An image is decoded once and read twice, and
costs a request each time in an image folder on S3; squares and what lies in compressed containers
are written twice, to a work file and to the shard. A worker holds at most `shard_files.PACK_BYTES`
or one shard, and 16 reads.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from drorae.config import to_json
from drorae.data.checked import Candidates, Checked
from drorae.data.decoding import ImageLimits
from drorae.data.jobs import ShardJob
from drorae.data.listing import list_images
from drorae.data.readers.candidates import Listing
from drorae.data.selection import Choice, choose
from drorae.data.shard_files import CheckPictures, PictureRule, WriteShard
from drorae.data.shard_format import ShardPart, part_name, write_index
from drorae.data.shard_map import Executor, map_shards
from drorae.data.shard_plan import plan_tasks
from drorae.failure import Fatal
from drorae.store import files
from drorae.store.context import StageContext, StageResult

__all__ = ["ShardJob", "run_shard"]

MIN_CHUNK_ROWS, MAX_CHUNK_ROWS = 128, 512
"""Images that one checking task handles: enough to outweigh a task's start, few enough to lose
little in a crash."""

CHUNKS_PER_ROUND = 64
"""Checking tasks aimed at in one round."""

MAX_SHARD_BYTES = 512 << 20
"""Pictures in one shard: a worker holds them at once."""


def run_shard(
    ctx: StageContext, *, shard: ShardJob, executor: Executor | None = None
) -> StageResult:
    """Build the shards of one job.

    Args:
        ctx: Where to write and what to report to.
        shard: The job.
        executor: Who runs the tasks; Ray Data unless given.

    Raises:
        FileNotFoundError: The source does not exist.
        ValueError: The source holds no usable training image, or no validation image although one
            is asked for, or a later stage could not work with its classes.
        Fatal: The source changed meanwhile; the next run checks it anew.
    """
    candidates = Candidates.of(_list(ctx, shard), shard.seed, shard.val_fraction)
    checked = Checked(len(candidates.listing))
    chosen = _choose_both(shard, candidates, checked)
    ctx.check_counts(_listed_counts(candidates, chosen))
    num_rounds = 0
    while any(len(choice.pending) for choice in chosen.values()):
        num_rounds += 1
        pending = np.concatenate([choice.pending for choice in chosen.values()])
        _check(ctx, shard, candidates, checked, pending, executor, num_rounds)
        chosen = _choose_both(shard, candidates, checked)
    rejects = _rejects(candidates, checked, chosen)
    _check_not_empty(shard, chosen, rejects)
    try:
        parts = {
            split: _write_split(ctx, shard, split, candidates, checked, choice.rows, executor)
            for split, choice in chosen.items()
        }
    except Fatal as error:
        if not isinstance(error.__cause__, OSError):  # a full disk says nothing of the source
            _forget_checks(ctx)
        raise
    return _finish(ctx, shard, candidates.listing, parts, rejects)


def _list(ctx: StageContext, job: ShardJob) -> Listing:
    """The images of a job; what was decided about them is told at once."""
    listing = list_images(
        job,
        on_progress=lambda done, total: ctx.progress(
            done, total, "folders", message="list the source"
        ),
    )
    for note in listing.notes:
        ctx.note(note.text, is_warning=note.is_doubtful)
    return listing


def _choose_both(job: ShardJob, candidates: Candidates, checked: Checked) -> dict[str, Choice]:
    content = checked.content()
    unique = job.duplicates == "reject"
    kept = np.full(int(content.max(initial=0)) + 1, -1, np.int64)
    val = choose(
        candidates.orders["val"],
        candidates.labels,
        content,
        job.max_val_images,
        kept if unique else None,
    )
    # Validation keeps its copy of a duplicate: training must not see it.
    known = val.rows[content[val.rows] >= 0]
    kept[content[known]] = known
    train = choose(
        candidates.orders["train"],
        candidates.labels,
        content,
        job.max_train_images,
        kept if unique else None,
    )
    return {"train": train, "val": val}


def _check(
    ctx: StageContext,
    job: ShardJob,
    candidates: Candidates,
    checked: Checked,
    pending: np.ndarray,
    executor: Executor | None,
    number: int,
) -> None:
    """Decode the pending candidates, and add what was found to `checked`."""
    rows = max(MIN_CHUNK_ROWS, min(MAX_CHUNK_ROWS, len(pending) // CHUNKS_PER_ROUND))
    tasks = plan_tasks(
        files.join(ctx.work_uri, "plan", f"check-{number}.arrows"),
        "check",
        lambda: ((chunk, {}) for chunk in candidates.chunks(pending, rows)),
    )
    rule = PictureRule(
        pictures=job.pictures, side_px=job.resolution_px, crop=job.crop, limits=ImageLimits.of(job)
    )
    results = map_shards(
        tasks,
        functools.partial(CheckPictures, _packs_uri(ctx), rule),
        work_uri=ctx.work_uri,
        compute=ctx.compute,
        on_progress=lambda done, total: ctx.progress(
            done, total, "checked images", message=f"check, round {number}"
        ),
        worker=ctx.workers,
        executor=executor,
    )
    checked.add([task.name for task in tasks], results)


def _forget_checks(ctx: StageContext) -> None:
    """Delete the markers of the checks: they describe pictures that are no longer there."""
    done_uri = files.join(ctx.work_uri, "done")
    for name in files.list_files(done_uri):
        if name.startswith("check-"):
            files.delete(files.join(done_uri, name))


def _packs_uri(ctx: StageContext) -> str:
    return files.join(ctx.work_uri, "packs")


def _rejects(
    candidates: Candidates, checked: Checked, chosen: dict[str, Choice]
) -> list[tuple[str, str]]:
    positions, reasons = checked.rejects()
    bad = zip(candidates.keys(positions), reasons, strict=True)
    pairs = np.concatenate([choice.duplicates for choice in chosen.values()])
    keys = zip(candidates.keys(pairs[:, 0]), candidates.keys(pairs[:, 1]), strict=True)
    equal = [(key, f"duplicate of {first}") for key, first in keys]
    return sorted([*candidates.listing.rejects, *bad, *equal])


def _check_not_empty(
    job: ShardJob, chosen: dict[str, Choice], rejects: Sequence[tuple[str, str]]
) -> None:
    if not len(chosen["train"].rows):
        reasons = Counter(reason.split(":")[0] for _, reason in rejects).most_common(6)
        told = ", ".join(f"{count} x {reason}" for reason, count in reasons) or "none was found"
        raise ValueError(
            f"shard.source={job.source!r} gives no usable training image ({told}): "
            "expected at least one. Correct the source or the limits of the shard section."
        )
    wants_val = job.val_source is not None or job.val_fraction > 0
    if wants_val and not len(chosen["val"].rows):
        raise ValueError(
            f"shard.val_fraction={job.val_fraction:g} of {len(chosen['train'].rows)} images leaves "
            "no validation image: raise it, or set shard.val_source."
        )


def _write_split(
    ctx: StageContext,
    job: ShardJob,
    split: str,
    candidates: Candidates,
    checked: Checked,
    rows: np.ndarray,
    executor: Executor | None,
) -> list[ShardPart]:
    def plans() -> Iterator[tuple[pa.Table, dict[str, Any]]]:
        for part, (start, stop) in enumerate(_bounds(checked.sizes(rows), job.rows_per_shard)):
            plan = checked.shard_plan(candidates, rows[start:stop], _packs_uri(ctx))
            yield plan, {"name": part_name(split, part), "first_id": start}

    tasks = plan_tasks(files.join(ctx.work_uri, "plan", f"{split}.arrows"), split, plans)
    results = map_shards(
        tasks,
        functools.partial(WriteShard, ctx.output_uri),
        work_uri=ctx.work_uri,
        compute=ctx.compute,
        on_progress=lambda done, total: ctx.progress(
            done, total, f"{split} images", message=f"write {split}"
        ),
        worker=ctx.workers,
        executor=executor,
    )
    return [ShardPart.from_json(result) for result in results]


def _bounds(sizes: np.ndarray, rows_per_shard: int) -> Iterator[tuple[int, int]]:
    """First and last row of each shard: at most so many rows and `MAX_SHARD_BYTES`."""
    ends = np.concatenate([[0], np.cumsum(sizes)])
    start = 0
    while start < len(sizes):
        fits = int(np.searchsorted(ends, ends[start] + MAX_SHARD_BYTES, side="right")) - 1
        stop = min(start + rows_per_shard, max(fits, start + 1), len(sizes))
        yield start, stop
        start = stop


def _listed_counts(candidates: Candidates, chosen: dict[str, Choice]) -> dict[str, Any]:
    """What `counts.json` would hold if every image were good."""
    names = candidates.listing.class_names
    rows = {split: choice.rows for split, choice in chosen.items()}
    counts = {
        split: {"rows": len(r), **_class_rows(candidates.labels[r], len(names))}
        for split, r in rows.items()
    }
    return {"class_names": list(names), **counts}


def _class_rows(labels: np.ndarray, num_classes: int) -> dict[str, Any]:
    """Images of each class, by label, and those that have none."""
    rows = np.bincount(labels + 1, minlength=num_classes + 1).tolist()
    return {"class_rows": rows[1:], "unlabelled_rows": rows[0]}


def _labels(parts: Sequence[ShardPart]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int32), *(part.labels for part in parts)])


def _finish(
    ctx: StageContext,
    job: ShardJob,
    listing: Listing,
    parts: dict[str, list[ShardPart]],
    rejects: Sequence[tuple[str, str]],
) -> StageResult:
    shards = {split: [len(part.labels) for part in parts[split]] for split in parts}
    counts = {
        **{
            split: {
                "rows": sum(rows),
                "shards": rows,
                **_class_rows(_labels(parts[split]), len(listing.class_names)),
            }
            for split, rows in shards.items()
        },
        "rejected": len(rejects),
        "class_names": list(listing.class_names),
        "resolution_px": job.resolution_px,
        "pictures": job.pictures,
        "crop": job.crop,
        "limits": to_json(ImageLimits.of(job)),
        "source_images": len(listing),
        "reading": [{"text": n.text, "is_doubtful": n.is_doubtful} for n in listing.notes],
        "source_digest": _digest_of(listing.table["key"]),
    }
    if job.view_px is not None:
        counts["view_px"] = job.view_px
    lines = [json.dumps({"key": key, "reason": reason}) for key, reason in rejects]
    written = [part.entry for split in parts for part in parts[split]]
    written += [
        *(write_index(ctx.output_uri, split, parts[split]) for split in parts),
        ctx.put_json("counts.json", counts),
        ctx.put_bytes("rejects.jsonl", "".join(f"{line}\n" for line in lines).encode()),
        ctx.put_json("config.json", {"shard": to_json(job)}),
    ]
    metrics = {f"shard/images/{split}": float(sum(rows)) for split, rows in shards.items()}
    return StageResult(
        files=written, metrics={**metrics, "shard/images/rejected": float(len(rejects))}
    )


def _digest_of(keys: pa.ChunkedArray) -> str:
    total = hashlib.sha256()
    for chunk in keys.chunks:
        total.update("\n".join(chunk.to_pylist()).encode())
    return total.hexdigest()[:20]
