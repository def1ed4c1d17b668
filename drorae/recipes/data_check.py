"""What the stages ask of the shards, checked before any of them trains.

Each function is named in the stage table (pipelines/stages.py) and is called three times: when a
run is planned, as soon as stage `shard` has listed the source, and again when it is done. It reads
`counts.json` only, whose size grows with classes and shards, not with images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from drorae.recipes.full import FullJob
from drorae.store.context import note_line

__all__ = [
    "Counted",
    "Listed",
    "check_classes",
    "check_evaluation",
    "check_validation",
    "reading_notes",
]

UNLABELLED = ["all"]
"""Classes of a source that states none (drorae.data.readers.candidates)."""
MAX_NAMES = 5


class Counted(Protocol):
    """Counts of images: the output of stage `shard`, or a source that was only listed."""

    @property
    def uri(self) -> str:
        """Where it lies."""
        ...

    def read_json(self, name: str) -> Any:
        """Content of `counts.json`."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """Counts of a source that was only listed."""

    uri: str
    """The source."""
    counts: dict[str, Any]
    """What `counts.json` would hold if no image were rejected."""

    def read_json(self, name: str) -> Any:
        """Counts."""
        return self.counts


def check_classes(full: FullJob, shards: Counted | None, stage: str) -> None:
    """Check that a generator has a row for every class, and an image for every row.

    One class too many would take the null class's row, and a class without an image would be
    sampled and measured untrained.

    Args:
        full: The configuration.
        shards: Output of stage `shard`; None while it is not there.
        stage: `diffusion` or `guide`.

    Raises:
        ValueError: If the numbers differ, or a class has no training image.
    """
    if shards is None:
        return
    counts = shards.read_json("counts.json")
    names, num_classes = counts["class_names"], getattr(full, stage).model.num_classes
    if len(names) != num_classes:
        raise ValueError(
            f"{_describe(names)}, but {stage}.model.num_classes={num_classes}: expected the same "
            f"number. Run with {_settings(len(names))}, or correct the source."
        )
    empty = [
        n for n, images in zip(names, counts["train"]["class_rows"], strict=True) if not images
    ]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(names)} classes have no training image ({_listed(empty)}), so "
            f"{stage} would not learn them: expected at least one each. Raise "
            f"shard.max_train_images={full.shard.max_train_images}, or see rejects.jsonl in "
            f"{shards.uri} and correct the source."
        )


def check_validation(full: FullJob, shards: Counted | None, stage: str) -> None:
    """Check that there are held-out images, on which every tokenizer phase is measured.

    Args:
        full: The configuration.
        shards: Output of stage `shard`; None while it is not there.
        stage: The stage that measures.

    Raises:
        ValueError: If there are none.
    """
    if shards is None or shards.read_json("counts.json")["val"]["rows"]:
        return
    raise ValueError(
        f"there is no validation image, but stage {stage} measures on some "
        f"(shard.val_fraction={full.shard.val_fraction:g}, shard.val_source="
        f"{full.shard.val_source!r}): expected at least one. Set shard.val_fraction above 0, for "
        "example 0.02, or shard.val_source."
    )


def check_evaluation(full: FullJob, shards: Counted | None, stage: str) -> None:
    """Check that there are as many held-out images as `evaluate` is to measure.

    Args:
        full: The configuration.
        shards: Output of stage `shard`; None while it is not there.
        stage: `evaluate`.

    Raises:
        ValueError: If there are fewer, or fewer than a kernel distance needs (2).
    """
    check_validation(full, shards, stage)
    wanted, cap = full.evaluate.num_val_images, full.shard.max_val_images
    if shards is not None:
        available = shards.read_json("counts.json")["val"]["rows"]
    elif cap is not None:
        available = cap
    else:
        return
    if available < max(wanted, 2):
        raise ValueError(
            f"evaluate.num_val_images={wanted} of {available} validation images: expected at most "
            "that many, 0 for all, and at least 2 images. Change it, or raise shard.val_fraction "
            f"or shard.max_val_images={cap}."
        )


def reading_notes(shards: Counted) -> list[str]:
    """What was decided when the source was read, a line each; doubtful decisions are warnings."""
    reading = shards.read_json("counts.json").get("reading", ())
    return [note_line(note["text"], is_warning=note["is_doubtful"]) for note in reading]


def _settings(num_classes: int) -> str:
    """What sets the classes of every generator, since one alone would not do."""
    stages = ("diffusion", "guide")
    return " ".join(f"--set {stage}.model.num_classes={num_classes}" for stage in stages)


def _describe(names: Sequence[str]) -> str:
    if list(names) == UNLABELLED:
        return "the data has 1 class (the source states no classes, so all images are of one)"
    return f"the data has {len(names)} classes ({_listed(names)})"


def _listed(names: Sequence[Any]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(map(str, names[:MAX_NAMES])) + more
