import dataclasses
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from loop_fakes import MemoryCheckpoints, Rows
from test_tokenizer import JOB, make_critic, make_phase
from torch import Tensor, nn

from drorae.config import Compute
from drorae.training.guards import SPIKE_SCORE, FiniteGuard, spike_score
from drorae.training.jobs import OptimConfig
from drorae.training.optim import build_optimizer
from drorae.training.tokenizer import train_tokenizer

SKIP = Compute(log_every_steps=1, on_non_finite="skip", rollback_after_skips=3)


class Scaled:
    """A perceptual loss times a factor that depends on the step."""

    def __init__(self, factors: dict[int, float]) -> None:
        self.factors, self.calls = factors, 0

    def __call__(self, recon: Tensor, images: Tensor) -> Tensor:
        factor = self.factors.get(self.calls, 1.0)
        self.calls += 1
        return (recon - images).abs().mean((1, 2, 3)) * factor


@pytest.fixture
def train(tokenizer_batches: Callable, make_tools: Callable) -> Callable[..., Any]:
    def run(
        factors: dict[int, float], compute: Compute, num_steps: int, kept: MemoryCheckpoints
    ) -> tuple[Any, Rows]:
        job = dataclasses.replace(JOB, lpips_weight=1.0, num_steps=num_steps)
        log, phase = Rows(), make_phase("decoder")
        tools = dataclasses.replace(make_tools(kept, log), compute=compute)
        batches = tokenizer_batches(num_steps, 4)
        report = train_tokenizer(job, phase, batches, Scaled(factors), tools, seed=0)
        return report, log

    return run


def bad(steps: Iterable[int]) -> dict[int, float]:
    return dict.fromkeys(steps, float("nan"))


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], value) for name, value in second.items())


def test_a_skipped_step_changes_no_weight_and_is_counted() -> None:
    layer = nn.Linear(2, 1)
    optimizer = build_optimizer(layer, OptimConfig(lr=0.1))
    guard = FiniteGuard(optimizer, torch.device("cpu"), policy="skip")
    moved, counts = [], []
    for step, loss in enumerate([1.0, float("inf"), float("nan"), 1.0, float("nan")]):
        before = layer.weight.detach().clone()
        layer.zero_grad()
        layer(torch.ones(3, 2)).sum().backward()
        guard.arm(step, torch.tensor(loss), torch.tensor(1.0))
        optimizer.step()
        guard.check("fusion", OptimConfig())
        moved.append(not torch.equal(before, layer.weight))
        counts.append(guard.skipped())
    assert moved == [True, False, False, True, False]
    assert counts == [(0, 0, 0), (1, 1, 1), (2, 2, 2), (2, 0, 2), (3, 1, 2)]
    again = FiniteGuard(optimizer, torch.device("cpu"), policy="skip")
    again.load_state_dict(guard.state_dict())
    assert again.skipped() == (3, 1, 2)
    again.restart()
    assert again.skipped() == (3, 0, 0)


def test_a_run_that_skips_goes_on_with_the_next_data(train: Callable) -> None:
    kept = MemoryCheckpoints(every=1)
    report, log = train(bad([2, 3]), SKIP, 6, kept)
    assert list(log.series("guard/skipped_steps").values()) == [0, 0, 1, 2, 2, 2]
    assert sorted(kept.saved) == [1, 2, 5]  # never one of a bad step
    assert kept.saved[5]["small"]["step"] == 5
    assert all(torch.isfinite(value).all() for value in report.weights.values())
    assert not same(kept.saved[2]["tensors"], kept.saved[5]["tensors"])


def test_skips_in_a_row_go_back_to_the_last_checkpoint_once(
    train: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    kept = MemoryCheckpoints(every=2)
    _, log = train(bad([3, 4, 5]), SKIP, 8, kept)
    assert "decoder: at step 6 back to the weights of step 2" in caplog.text
    # The step goes on; weights and moments are those of step 2.
    assert sorted(kept.saved) == [2, 6]
    kinds = {name.split(".")[0] for name in kept.saved[2]["tensors"]}
    assert kinds == {"module", "optimizer", "ema"}
    assert same(kept.saved[6]["tensors"], kept.saved[2]["tensors"])
    small = kept.saved[6]["small"]
    assert (small["step"], small["rolled_back_at"]) == (6, 6)
    assert list(log.series("train/l1")) == list(range(1, 9))
    assert log.series("guard/skipped_steps")[8] == 3


@pytest.mark.parametrize(
    ("every", "message"), [(2, "last checkpoint did not help"), (100, "and no checkpoint")]
)
def test_skips_that_going_back_does_not_end_stop_the_stage(
    train: Callable, every: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=f"3 steps in a row up to step .*{message}"):
        train(bad(range(3, 100)), SKIP, 20, MemoryCheckpoints(every=every))


def test_a_discriminator_with_a_bad_step_stops_too(
    tokenizer_batches: Callable, make_tools: Callable
) -> None:
    from test_tokenizer import JUDGE, AdversarialConfig

    adversarial = AdversarialConfig(weight=0.5, discriminator=JUDGE, start_step=5)
    job = dataclasses.replace(JOB, adversarial=adversarial)
    critic = make_critic(job)
    before = {k: v.clone() for k, v in critic.state_dict()["module"].items() if "orig" in k}

    def poisoned(start: int) -> Any:
        for batch in tokenizer_batches(6, 4)(start):
            yield batch
            parameter = next(critic._module.parameters())
            if batch.step == 1:
                parameter.grad = None
                critic._module.heads[0][2].bias.data.fill_(float("nan"))

    with pytest.raises(RuntimeError, match=r"decoder: .*not finite at step 2"):
        train_tokenizer(
            job, make_phase("decoder"), poisoned, None, make_tools(), seed=0, critic=critic
        )
    after = critic.state_dict()["module"]
    assert all(torch.isfinite(after[name]).all() for name in before)


def test_a_score_tells_a_spike_from_noise() -> None:
    draw = random.Random(0)
    losses = [1.0 + 0.1 * draw.gauss(0, 1) for _ in range(2000)]
    scores = [spike_score(losses[:i], losses[i]) for i in range(2000)]
    assert scores[:10] == [0.0] * 10
    assert max(scores[10:]) < SPIKE_SCORE
    assert spike_score(losses, 3.0) > SPIKE_SCORE
    assert spike_score([*losses, 50.0, 60.0, 70.0], 3.0) > SPIKE_SCORE
    assert spike_score([1.0] * 20, 1.0) == 0.0
    assert spike_score([1.0] * 20, 2.0) > SPIKE_SCORE
    assert spike_score(losses, -3.0) < 0


def test_a_spike_is_logged_and_warned_of_and_changes_nothing(
    train: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    compute = Compute(log_every_steps=1)
    _, log = train({12: 1000.0}, compute, 14, MemoryCheckpoints())
    scores = log.series("train/loss_spike")
    assert scores[13] > SPIKE_SCORE
    assert "decoder: loss" in caplog.text
    assert "at step 13 lies" in caplog.text
    assert list(scores) == list(range(1, 15))
