import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loop_fakes import STATS, MemoryCheckpoints, Rows

from drorae.diffusion.interpolation import add_noise
from drorae.models.dit import DiT, DiTConfig
from drorae.training.diffusion import draw_step, loss_terms, train_diffusion
from drorae.training.jobs import DiffusionStage, OptimConfig

JOB = DiffusionStage(
    model=DiTConfig(
        input_size=2,
        in_channels=8,
        hidden_size=(16, 16),
        depth=(1, 1),
        num_heads=(2, 2),
        num_classes=3,
    ),
    num_steps=6,
    batch_images=6,
    optim=OptimConfig(lr=1e-2, weight_decay=0.0, schedule="constant", clip_norm=1.0),
    ema_decay=0.5,
)


def make_model() -> DiT:
    torch.manual_seed(7)
    return DiT(JOB.model)


def test_the_loop_lowers_its_loss(latent_batches: Callable, make_tools: Callable) -> None:
    job, log = dataclasses.replace(JOB, num_steps=150), Rows()
    model, tools = make_model(), make_tools(log=log)
    train_diffusion(
        job, model, latent_batches(150, 6), tools, stats=STATS, stage="diffusion", seed=0
    )
    losses = list(log.series("train/loss").values())
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    latent_batches: Callable, make_tools: Callable
) -> None:
    def run(checkpoints: MemoryCheckpoints, num_batches: int) -> tuple[Any, Any]:
        model, tools = make_model(), make_tools(checkpoints)
        batches = latent_batches(num_batches, 6)
        report = train_diffusion(JOB, model, batches, tools, stats=STATS, stage="guide", seed=0)
        return model.state_dict(), report.ema

    straight, straight_ema = run(MemoryCheckpoints(), 6)
    kept = MemoryCheckpoints(every=2)
    run(kept, 5)
    resumed, resumed_ema = run(kept, 6)
    assert max(kept.saved) == 4
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)
    assert all(torch.equal(straight_ema[k], resumed_ema[k]) for k in straight_ema)


def test_draws_do_not_depend_on_how_a_batch_is_cut_over_ranks() -> None:
    latents, labels = torch.randn(6, 8, 2, 2).half(), torch.zeros(6, dtype=torch.long)

    def draw(part: slice) -> tuple[Any, ...]:
        positions = torch.arange(6)[part]
        batch = SimpleNamespace(
            step=3, positions=positions, latents=latents[part], labels=labels[part]
        )
        return draw_step(JOB, batch, 1, STATS)

    whole, second = draw(slice(0, 6)), draw(slice(3, 6))
    assert all(torch.equal(a[3:], b) for a, b in zip(whole, second, strict=True))


def test_a_step_normalises_latents_and_drops_a_tenth_of_the_labels() -> None:
    job = dataclasses.replace(JOB, batch_images=5000)
    batch = SimpleNamespace(
        step=0,
        positions=torch.arange(5000),
        latents=torch.full((5000, 1, 1, 1), 5.0).half(),
        labels=torch.zeros(5000, dtype=torch.long),
    )
    stats = {"mean": torch.full((1, 1, 1), 1.0), "var": torch.full((1, 1, 1), 4.0)}
    clean, t, noise, labels = draw_step(job, batch, 0, stats)
    torch.testing.assert_close(clean, torch.full((5000, 1, 1, 1), 2.0), rtol=1e-4, atol=0)
    # binomial, standard deviation 0.004
    assert (labels == JOB.model.num_classes).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert 0 <= t.min() < t.max() <= 1
    assert noise.std().item() == pytest.approx(1, abs=0.05)


def test_the_loss_of_a_clean_prediction_is_the_velocity_error_of_both_heads() -> None:
    job = dataclasses.replace(JOB, prediction="clean", base_weight=0.5)
    generator = torch.Generator().manual_seed(0)
    shape = (2, 8, 2, 2)
    clean, noise, full, base = (torch.randn(shape, generator=generator) for _ in range(4))
    t = torch.tensor([0.02, 0.5])
    noisy, floor = add_noise(clean, noise, t), torch.tensor([0.05, 0.5]).view(2, 1, 1, 1)
    by_hand = [((noisy - x) / floor - (noise - clean)).square().mean() for x in (full, base)]
    terms = loss_terms(job, (full, base), clean, noise, t)
    torch.testing.assert_close(terms["loss_full"], by_hand[0])
    torch.testing.assert_close(terms["loss_base"], by_hand[1])
    torch.testing.assert_close(terms["loss"], by_hand[0] + 0.5 * by_hand[1])
    plain = loss_terms(JOB, noise - clean, clean, noise, t)
    assert plain == {"loss": 0.0}


def test_a_clean_predictor_with_a_base_head_learns_with_both_losses_logged(
    latent_batches: Callable, make_tools: Callable
) -> None:
    model = dataclasses.replace(JOB.model, base_head_after=1)
    job = dataclasses.replace(JOB, model=model, prediction="clean", num_steps=60)
    torch.manual_seed(7)
    log, network = Rows(), DiT(model)
    tools = make_tools(log=log)
    train_diffusion(
        job, network, latent_batches(60, 6), tools, stats=STATS, stage="diffusion", seed=0
    )
    full, base = (list(log.series(f"train/loss_{name}").values()) for name in ("full", "base"))
    assert sum(full[-10:]) < 0.9 * sum(full[:10])
    assert sum(base[-10:]) < 0.9 * sum(base[:10])
    total = list(log.series("train/loss").values())
    assert total == pytest.approx([a + b for a, b in zip(full, base, strict=True)], rel=1e-6)


@pytest.mark.parametrize("fields", [{"num_steps": 0}, {"ema_decay": -0.1}, {"base_weight": -1.0}])
def test_impossible_stages_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        dataclasses.replace(JOB, **fields)


def test_a_resume_hands_on_the_rows_that_earlier_attempts_logged(
    latent_batches: Callable, make_tools: Callable
) -> None:
    earlier: list[Any] = []
    kept = MemoryCheckpoints(every=4)
    for num_steps in (5, 6):
        log = Rows()
        tools = make_tools(kept, log=log, catch_up=earlier.append)
        job = dataclasses.replace(JOB, num_steps=num_steps)
        batches = latent_batches(num_steps, 6)
        train_diffusion(job, make_model(), batches, tools, stats=STATS, stage="diffusion", seed=0)
    assert [[row["step"] for row in rows] for rows in earlier] == [[1, 2, 3, 4]]
    assert [step for step, _ in log.rows] == [5, 6]
