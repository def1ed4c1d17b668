"""What a loop keeps of its measurements."""

import math
from collections.abc import Callable

from loop_fakes import MemoryCheckpoints
from test_tokenizer import JOB, make_decoder, make_fusion

from drorae.training.tokenizer import decoder_phase, train_tokenizer
from drorae.training.world import World


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
