import io

import pytest
from rich.console import Console

from pipelines.display import (
    BarDisplay,
    LineDisplay,
    choose_display,
    describe_progress,
    format_duration,
)

PROGRESS = {
    "done": 120,
    "total": 500,
    "unit": "steps",
    "rate_per_s": 9.84,
    "eta_s": 38.6,
    "images_per_s": 45.1,
    "message": "training",
}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.44, "0.4 s"), (42.2, "42 s"), (185, "3:05"), (7385, "2:03:05")],
)
def test_durations_are_short(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


def test_progress_says_rate_and_time_left() -> None:
    text = describe_progress(PROGRESS)
    assert text == "120/500 steps, 9.8 steps/s, 45.1 images/s, 39 s left, training"
    assert describe_progress({"done": 1, "total": 2, "unit": "images"}) == "1/2 images"
    assert describe_progress({"message": "waits"}) == "waits"


def play(console: Console) -> str:
    display = choose_display(console)
    display.started("fusion")
    display.progress("fusion", PROGRESS)
    display.progress("fusion", PROGRESS)
    display.note("a note [with brackets]")
    display.finished("fusion", "built", 12.0)
    display.close()
    return console.file.getvalue()


def test_lines_for_a_file_are_few() -> None:
    console = Console(file=io.StringIO(), width=100)
    assert isinstance(choose_display(console), LineDisplay)
    text = play(console)
    assert text.count("120/500 steps") == 1
    assert "a note [with brackets]" in text
    assert "fusion: built (12 s)" in text


def test_bars_for_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    display = choose_display(console)
    assert isinstance(display, BarDisplay)
    display.close()
    assert "built (12 s)" in play(console)
