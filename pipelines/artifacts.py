"""What a run leaves in the Prefect UI: the results table, the image grids, and links."""

import base64
import logging
from collections.abc import Iterable, Mapping, Sequence

from prefect.artifacts import create_image_artifact, create_link_artifact, create_markdown_artifact

from drorae.store import files
from pipelines.display import format_duration
from pipelines.plan import RunPlan
from pipelines.quality import quality_tables
from pipelines.session import Outcome

MAX_IMAGE_BYTES = 2 << 20
MAX_IMAGES = 8

log = logging.getLogger(__name__)


def publish(plan: RunPlan, outcomes: Mapping[str, Outcome]) -> None:
    """Create the artifacts of a run; a server that refuses them does not fail the run."""
    try:
        create_markdown_artifact(_table(plan, outcomes), key="results", description="Stages")
        for number, name, image in _grids(outcomes):
            create_image_artifact(image_url=image, key=f"grid-{number}", description=name)
        for stage, outcome in outcomes.items():
            if stage == "report":
                create_link_artifact(_link(outcome.uri), link_text="report.html", key="report")
    except Exception as error:
        log.warning("Prefect artifacts were not created: %s", error)


def _link(output_uri: str) -> str:
    uri = files.join(output_uri, "report.html")
    return uri if "://" in uri else f"file://{uri}"


def _table(plan: RunPlan, outcomes: Mapping[str, Outcome]) -> str:
    lines = [
        f"Recipe `{plan.request.recipe}` {' '.join(f'`{o}`' for o in plan.request.overrides)}",
        "",
        "| stage | key | outcome | time | note |",
        "|---|---|---|---|---|",
    ]
    for step in plan.steps:
        outcome = outcomes.get(step.stage)
        if outcome is None:
            lines.append(f"| {step.stage} | `{step.key}` | {step.state} | | {step.reason} |")
            continue
        time_text = format_duration(outcome.wall_s)
        lines.append(f"| {step.stage} | `{step.key}` | {outcome.outcome} | {time_text} | |")
    for outcome in outcomes.values():
        for title, columns, rows in quality_tables(outcome.metrics):
            lines += ["", f"**{title}**", "", *_markdown([columns, ("---",) * len(columns), *rows])]
    return "\n".join(lines)


def _markdown(rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in rows]


def _grids(outcomes: Mapping[str, Outcome]) -> list[tuple[int, str, str]]:
    """Return number, name and data URI of the evaluation's image grids."""
    if "evaluate" not in outcomes:
        return []
    folder = files.join(outcomes["evaluate"].uri, "grids")
    found: list[tuple[int, str, str]] = []
    for name in sorted(n for n in files.list_files(folder) if n.endswith(".png"))[:MAX_IMAGES]:
        data = files.read_bytes(files.join(folder, name))
        if len(data) <= MAX_IMAGE_BYTES:
            uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            found.append((len(found), name, uri))
    return found
