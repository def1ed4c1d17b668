"""Stage `shard`: raw images of any source become Parquet shards of square PNGs, train and val.

Training shards may hold a second, uncropped copy of each picture, from which random crops are cut
at load time; validation is always the square.

Steps: list candidates; choose by hash; decode what was chosen (Ray Data, one task a chunk); choose
again until every chosen
one is good; write the shards (Ray Data, one task a shard). The bytes depend on the source and on
ShardJob only. With a cap, files that the cap leaves out are neither read nor checked.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from drorae.config import to_json
from drorae.data.decoding import ImageLimits
from drorae.data.jobs import ShardJob
from drorae.data.readers.candidates import Candidate, Listing, sort_class_names
from drorae.data.readers.source import list_source
from drorae.data.selection import Choice, Decoded, choose, split_candidates
from drorae.data.shard_files import DecodeChunk, WriteShard, part_name
from drorae.data.shard_map import Executor, ShardTask, map_shards
from drorae.store import files
from drorae.store.context import StageContext, StageResult
from drorae.store.files import FileEntry

__all__ = ["ShardJob", "run_shard"]

MIN_CHUNK_ROWS, MAX_CHUNK_ROWS = 256, 4096
"""Images that one decoding task handles: enough to outweigh a task's start, few enough to lose
little in a crash."""

CHUNKS_PER_ROUND = 64
"""Decoding tasks aimed at in one round."""


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
            is asked for.
    """
    listing = _list(shard)
    train, val = split_candidates(listing.candidates, shard.seed, shard.val_fraction)
    decoded: dict[str, Decoded] = {}
    chosen = _choose_both(shard, train, val, decoded)
    num_rounds = 0
    while pending := [*chosen["train"].pending, *chosen["val"].pending]:
        num_rounds += 1
        decoded |= _decode(ctx, shard, pending, executor, num_rounds)
        chosen = _choose_both(shard, train, val, decoded)
    rejects = _rejects(listing, decoded, chosen)
    _check_not_empty(shard, chosen, rejects)
    labels = {name: label for label, name in enumerate(listing.class_names)}
    entries = {}
    for split in ("train", "val"):
        tasks = _part_tasks(shard, split, chosen[split].rows, decoded, labels)
        entries[split] = _write_split(ctx, shard, split, tasks, executor)
    class_rows = {
        split: _class_rows(choice.rows, listing.class_names) for split, choice in chosen.items()
    }
    return _finish(ctx, shard, listing, entries, class_rows, rejects)


def _list(job: ShardJob) -> Listing:
    columns = {"image_column": job.image_column, "label_column": job.label_column}
    listing = list_source(job.source, **columns)
    if job.val_source is None:
        return listing
    val = list_source(job.val_source, **columns)
    names = listing.class_names
    if set(val.class_names) - set(names):
        names = tuple(sort_class_names({*names, *val.class_names}))
    return Listing(
        candidates=[_moved(c, "train") for c in listing.candidates]
        + [_moved(c, "val") for c in val.candidates],
        rejects=[(f"train/{key}", reason) for key, reason in listing.rejects]
        + [(f"val/{key}", reason) for key, reason in val.rejects],
        class_names=names,
    )


def _moved(candidate: Candidate, split: str) -> Candidate:
    row = candidate.to_row()
    row[0], row[2] = f"{split}/{candidate.key}", split
    return Candidate(*row)


def _choose_both(
    job: ShardJob,
    train: Sequence[Candidate],
    val: Sequence[Candidate],
    decoded: dict[str, Decoded],
) -> dict[str, Choice]:
    unique = job.duplicates == "reject"
    val_choice = choose(val, decoded, job.max_val_images, {} if unique else None)
    # Validation keeps its copy of a duplicate: training must not see it.
    kept = {decoded[c.key].sha256: c.key for c in val_choice.rows if c.key in decoded}
    train_choice = choose(train, decoded, job.max_train_images, kept if unique else None)
    return {"train": train_choice, "val": val_choice}


def _decode(
    ctx: StageContext,
    job: ShardJob,
    pending: Sequence[Candidate],
    executor: Executor | None,
    number: int,
) -> dict[str, Decoded]:
    # Neighbours in a container are decoded together; the hash order is restored inside each chunk.
    place = sorted(pending, key=lambda c: (c.container, c.index, c.member, c.key))
    rank = {c.key: i for i, c in enumerate(pending)}
    rows = max(MIN_CHUNK_ROWS, min(MAX_CHUNK_ROWS, len(place) // CHUNKS_PER_ROUND))
    chunks = [place[start : start + rows] for start in range(0, len(place), rows)]
    tasks = [_chunk_task(chunk, rank) for chunk in chunks]
    limits = ImageLimits(
        min_side_px=job.min_side_px,
        max_aspect_ratio=job.max_aspect_ratio,
        max_pixels=job.max_pixels,
    )
    results = map_shards(
        tasks,
        functools.partial(
            DecodeChunk, _chunks_uri(ctx), job.resolution_px, job.crop, limits, job.view_px
        ),
        work_uri=ctx.work_uri,
        compute=ctx.compute,
        on_progress=lambda done, total: ctx.progress(
            done, total, "chunks", message=f"decode {len(pending)} images, round {number}"
        ),
        executor=executor,
    )
    outcomes: dict[str, Decoded] = {}
    for result in results:
        for row, (key, sha256) in enumerate(result["accepted"]):
            outcomes[key] = Decoded(sha256, chunk=result["chunk"], row=row)
        outcomes |= {key: Decoded("", reason=reason) for key, reason in result["rejected"]}
    return outcomes


def _chunk_task(chunk: Sequence[Candidate], rank: dict[str, int]) -> ShardTask:
    order = sorted((c.key for c in chunk), key=lambda key: rank[key])
    payload = {"candidates": [c.to_row() for c in chunk], "order": order}
    return ShardTask(f"chunk-{_short_digest(payload)}", payload)


def _short_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def _chunks_uri(ctx: StageContext) -> str:
    return files.join(ctx.work_uri, "decoded")


def _rejects(
    listing: Listing, decoded: dict[str, Decoded], chosen: dict[str, Choice]
) -> list[tuple[str, str]]:
    bad = [(key, outcome.reason) for key, outcome in decoded.items() if outcome.reason]
    duplicates = {**chosen["train"].duplicates, **chosen["val"].duplicates}
    equal = [(key, f"duplicate of {first}") for key, first in duplicates.items()]
    return sorted([*listing.rejects, *bad, *equal])


def _check_not_empty(
    job: ShardJob, chosen: dict[str, Choice], rejects: Sequence[tuple[str, str]]
) -> None:
    if not chosen["train"].rows:
        reasons = Counter(reason.split(":")[0] for _, reason in rejects).most_common(6)
        told = ", ".join(f"{count} x {reason}" for reason, count in reasons) or "none was found"
        raise ValueError(
            f"shard.source={job.source!r} gives no usable training image ({told}): "
            "expected at least one. Correct the source or the limits of the shard section."
        )
    wants_val = job.val_source is not None or job.val_fraction > 0
    if wants_val and not chosen["val"].rows:
        raise ValueError(
            f"shard.val_fraction={job.val_fraction:g} of {len(chosen['train'].rows)} images leaves "
            "no validation image: raise it, or set shard.val_source."
        )


def _part_tasks(
    job: ShardJob,
    split: str,
    rows: Sequence[Candidate],
    decoded: dict[str, Decoded],
    labels: dict[str, int],
) -> list[ShardTask]:
    tasks = []
    for part, start in enumerate(range(0, len(rows), job.rows_per_shard)):
        found = [(decoded[c.key], c) for c in rows[start : start + job.rows_per_shard]]
        payload = {
            "name": part_name(split, part),
            "first_id": start,
            "rows": [[d.chunk, d.row, labels[c.class_name]] for d, c in found],
        }
        # The digest keeps a marker of an earlier attempt from standing for other rows.
        tasks.append(ShardTask(f"{split}-{part:05d}-{_short_digest(payload)}", payload))
    return tasks


def _write_split(
    ctx: StageContext,
    job: ShardJob,
    split: str,
    tasks: Sequence[ShardTask],
    executor: Executor | None,
) -> list[dict[str, Any]]:
    has_views = split == "train" and job.view_px is not None
    return map_shards(
        tasks,
        functools.partial(WriteShard, _chunks_uri(ctx), ctx.output_uri, has_views),
        work_uri=ctx.work_uri,
        compute=ctx.compute,
        on_progress=lambda done, total: ctx.progress(
            done, total, "shards", message=f"write {split}"
        ),
        executor=executor,
    )


def _class_rows(rows: Sequence[Candidate], class_names: Sequence[str]) -> list[int]:
    """Images of each class, by label."""
    found = Counter(candidate.class_name for candidate in rows)
    return [found[name] for name in class_names]


def _finish(
    ctx: StageContext,
    job: ShardJob,
    listing: Listing,
    entries: dict[str, list[dict[str, Any]]],
    class_rows: dict[str, list[int]],
    rejects: Sequence[tuple[str, str]],
) -> StageResult:
    shards = {split: [entry["rows"] for entry in entries[split]] for split in entries}
    counts = {
        **{
            split: {"rows": sum(rows), "shards": rows, "class_rows": class_rows[split]}
            for split, rows in shards.items()
        },
        "rejected": len(rejects),
        "class_names": list(listing.class_names),
        "resolution_px": job.resolution_px,
        "source_images": len(listing.candidates),
        "source_digest": _short_digest([c.key for c in listing.candidates]),
    }
    if job.view_px is not None:
        counts["view_px"] = job.view_px
    lines = [json.dumps({"key": key, "reason": reason}) for key, reason in rejects]
    written = [
        FileEntry(name=e["name"], size_bytes=e["size_bytes"], sha256=e["sha256"])
        for split in entries
        for e in entries[split]
    ]
    written += [
        ctx.put_json("counts.json", counts),
        ctx.put_bytes("rejects.jsonl", "".join(f"{line}\n" for line in lines).encode()),
        ctx.put_json("config.json", {"shard": to_json(job)}),
    ]
    metrics = {f"shard/images/{split}": float(sum(rows)) for split, rows in shards.items()}
    return StageResult(
        files=written, metrics={**metrics, "shard/images/rejected": float(len(rejects))}
    )
