"""`drorae inspect`: what stage `shard` would read of a source, before any run."""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from drorae.config import override, to_json
from drorae.data.jobs import ShardJob
from drorae.recipes.data_check import Listed
from pipelines import stages
from pipelines.display import LINE_EVERY_S, BarDisplay
from pipelines.inspect_display import print_inspection, print_problems
from pipelines.models_command import check_out
from pipelines.plan import configuration

if TYPE_CHECKING:
    from drorae.data.inspection import Inspection

NO_SOURCE = "SOURCE"
"""Stands for a source until one is given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardOnly:
    """A configuration without a recipe, so that `--set` has the same paths."""

    shard: ShardJob
    """What would be read."""


def inspect(options: argparse.Namespace, console: Console) -> int:
    """Print counts, classes, doubtful decisions and a decoded sample of a source."""
    full = configuration_of(options)
    if options.sheet:
        check_out(options.sheet, "--sheet")

    from drorae.data.inspection import inspect_source  # seconds to import

    with _listing_progress() as on_progress:
        found, images = inspect_source(
            full.shard, num_images=options.images, on_progress=on_progress
        )
    problems = _problems(full, found) if options.recipe else None
    if options.sheet:
        from drorae.data.contact_sheet import contact_sheet

        Path(options.sheet).write_bytes(contact_sheet(images, found.class_names, _title(found)))
    if options.json:
        recipe = {"recipe": options.recipe, "problems": problems} if options.recipe else {}
        console.print_json(json.dumps(to_json(found) | recipe | {"sheet": options.sheet}))
    else:
        print_inspection(found, full.shard, console)
        if problems is not None:
            print_problems(options.recipe, problems, console)
        if options.sheet:
            console.print(
                f"\ncontact sheet: {options.sheet}", highlight=False, markup=False, soft_wrap=True
            )
    return 0


def configuration_of(options: argparse.Namespace) -> Any:
    """Return a recipe's configuration, or one of `shard` alone, with SOURCE in it.

    Raises:
        ValueError: For an unknown recipe or path, a value that a field refuses, or no source.
    """
    if options.recipe:
        full = configuration(options.recipe, options.overrides)
    else:
        nowhere = ShardOnly(shard=ShardJob(source=NO_SOURCE))
        full = override(nowhere, options.overrides)
    given = {"source": options.source, "val_source": options.val_source}
    shard = replace(full.shard, **{name: value for name, value in given.items() if value})
    if shard.source == NO_SOURCE:
        raise ValueError("no source is given: expected SOURCE, or --recipe R for that of a recipe.")
    return replace(full, shard=shard)


def _problems(full: Any, found: "Inspection") -> list[str]:
    """What keeps the stages of a recipe from working with the source, each said once."""
    listed = Listed(uri=found.source, counts=_counts(found))
    problems: dict[str, str] = {}
    for stage in stages.enabled_stages(full, stages.STAGES):
        try:
            stages.check_output(full, "shard", listed, [stage])
        except ValueError as error:
            what, _, _ = str(error).partition(", but ")  # behind it several stages are named
            problems.setdefault(what, str(error))
    return list(problems.values())


def _counts(found: "Inspection") -> dict[str, Any]:
    splits = {s.name: {"rows": s.kept, "class_rows": list(s.kept_rows)} for s in found.splits}
    return {"class_names": list(found.class_names), **splits}


def _title(found: "Inspection") -> str:
    return (
        f"{found.source}: {found.images:,} images, {len(found.class_names):,} classes; "
        f"{found.sample.images} sampled by hash"
    )


@contextmanager
def _listing_progress() -> Iterator[Callable[[int, int], None]]:
    """Shows on stderr how far a listing is: a bar on a terminal, else a line now and then."""
    console = Console(stderr=True)
    if console.is_terminal:
        bars = BarDisplay(console)
        bars.started("listing")
        try:
            yield lambda done, total: bars.progress("listing", _progress(done, total))
        finally:
            bars.close()
        return
    last_s = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= LINE_EVERY_S:
            last_s = time.monotonic()
            console.print(f"listing: {done:,} of {total:,}", highlight=False, markup=False)

    yield tell


def _progress(done: int, total: int) -> dict[str, Any]:
    return {"done": done, "total": total, "unit": "folders or archives"}
