"""What a scenario showed, as a row, and all rows as a table."""

from collections.abc import Sequence
from dataclasses import dataclass, field

HEADERS = (
    *("scenario", "what was done, when", "found after s", "steps redone"),
    *("groups", "attempts", "result equal", "ok"),
)


@dataclass(kw_only=True, slots=True)
class Row:
    """Outcome of one scenario."""

    scenario: str
    """Its name."""
    done: str = ""
    """What was done to the run, and when."""
    found_after_s: float | None = None
    """Seconds from the fault to the end of the last worker that it left behind."""
    steps_redone: list[int] = field(default_factory=list)
    """For every restart, the steps done again."""
    groups: int = 0
    """Groups of workers that ran."""
    attempts: int = 0
    """Jobs that were started."""
    equal: bool | None = None
    """Whether weights and losses are those of the undisturbed run."""
    problems: list[str] = field(default_factory=list)
    """What is wrong; a row without any is ok."""
    wall_s: float = 0.0
    """Seconds of the scenario."""

    @property
    def ok(self) -> bool:
        """Whether everything is as it has to be."""
        return not self.problems

    def cells(self) -> tuple[str, ...]:
        """Texts in the order of `HEADERS`."""
        found = "-" if self.found_after_s is None else f"{self.found_after_s:.1f}"
        equal = {True: "yes", False: "NO", None: "-"}[self.equal]
        redone = "+".join(map(str, self.steps_redone)) or "0"
        numbers = (found, redone, str(self.groups or "-"), str(self.attempts or "-"))
        return (self.scenario, self.done, *numbers, equal, "ok" if self.ok else "FAILED")


def render(rows: Sequence[Row]) -> str:
    """The table as Markdown, and below it what is wrong."""
    lines = [HEADERS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADERS))]
    lines.insert(1, tuple("-" * width for width in widths))
    text = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in lines
    ]
    text += [f"{row.scenario}: {problem}" for row in rows for problem in row.problems]
    return "\n".join(text)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return "| " + " | ".join(padded) + " |"
