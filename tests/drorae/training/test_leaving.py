"""What a loop does when it is left by an exception, or measures what is no number."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from loop_fakes import MemoryCheckpoints
from test_tokenizer import JOB, make_decoder, make_fusion

from drorae.store.context import StageContext
from drorae.training import stages, watchdog
from drorae.training.stages import _Tools
from drorae.training.tokenizer import decoder_phase, train_tokenizer
from drorae.training.watchdog import Watchdog, watched
from drorae.training.world import World


class SlowTracker:
    """Waits for an absent server when it is closed."""

    def close(self) -> None:
        time.sleep(1.0)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


def test_an_exception_is_not_taken_for_a_hang_while_the_tracker_closes(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "REPORT_EVERY_S", (0.05, 0.05))
    monkeypatch.setattr(watchdog, "end_process", lambda code: None)
    monkeypatch.setattr(stages, "connect", lambda ctx: SlowTracker())
    hangs: list[tuple[int, str]] = []
    told = lambda rank, message: hangs.append((rank, message))  # noqa: E731
    ctx = StageContext(stage="fusion", key="k", output_uri=str(tmp_path / "out"))

    def loop(batches: Iterator[int]) -> None:
        for number in batches:
            if number == 2:
                raise ValueError("the first exception")

    with (
        Watchdog(str(tmp_path), 0, 1, 0.3, 5.0, told),
        pytest.raises(ValueError, match="the first exception"),
        _Tools(ctx, World()),
    ):
        loop(watched(lambda start: iter(range(4)))(0))
    assert not hangs


def test_a_measurement_that_is_no_number_does_not_wipe_out_the_best(
    tokenizer_batches: Callable, make_tools: Callable
) -> None:
    values = {2: 5.0, 4: math.nan, 6: 4.0}
    tools = make_tools(
        MemoryCheckpoints(), evaluators=[lambda step, prefix: {f"{prefix}/psnr_db": values[step]}]
    )
    job = JOB.__class__(num_steps=6, batch_images=4, lpips_weight=0.0, eval_every_steps=2)
    phase = decoder_phase("decoder", make_fusion("rae"), make_decoder(), World())
    report = train_tokenizer(job, phase, tokenizer_batches(6, 4), None, tools, seed=0)
    best = [row["best/eval/psnr_db"] for row in report.history if "best/eval/psnr_db" in row]
    assert best == [5.0, 5.0, 5.0]
