"""What a check measured, against its bound, as a line of a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

HEADERS = ("check", "what", "measured", "bound", "ok")


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One number."""

    check: str
    """Name of the check."""
    what: str
    """What was measured, with its unit."""
    measured: float
    """The number."""
    bound: float
    """What it is held against."""
    side: Literal["at most", "at least"] = "at most"
    """On which side of the bound it has to lie."""

    @property
    def ok(self) -> bool:
        """Whether it does."""
        return (
            self.measured <= self.bound if self.side == "at most" else self.measured >= self.bound
        )

    def cells(self) -> tuple[str, ...]:
        """Texts in the order of `HEADERS`."""
        bound = f"{self.side} {self.bound:,.4g}"
        return (self.check, self.what, f"{self.measured:,.4g}", bound, "ok" if self.ok else "FAIL")


def render(lines: Sequence[Line]) -> str:
    """The table as Markdown."""
    rows = [HEADERS, *(line.cells() for line in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADERS))]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    )
