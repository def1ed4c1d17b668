import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from loop_fakes import DIM, LAYERS, TOKENS, MemoryCheckpoints, Rows
from torch import Tensor, nn

from drorae.losses.adversarial import augment, generator_loss, to_signed
from drorae.models.decoder import Decoder, DecoderConfig
from drorae.models.discriminator import DiscriminatorConfig, build_discriminator
from drorae.models.fusion import FusionConfig, build_fusion
from drorae.training.critic import Critic, Judged
from drorae.training.jobs import AdversarialConfig, OptimConfig, TokenizerTraining
from drorae.training.tokenizer import (
    TokenizerPhase,
    decoder_phase,
    fusion_phase,
    noised,
    train_tokenizer,
)
from drorae.training.world import World

JOB = TokenizerTraining(
    num_steps=6,
    batch_images=4,
    optim=OptimConfig(lr=1e-2, weight_decay=0.0),
    lpips_weight=0.0,
    ema_decay=0.5,
    eval_every_steps=3,
)
JUDGE = DiscriminatorConfig(
    source="random", input_px=8, patch_px=4, width=8, depth=2, heads=2, taps=(1, 2), kernel=3
)


def make_decoder() -> Decoder:
    torch.manual_seed(3)
    return Decoder(
        DecoderConfig(
            latent_channels=DIM, width=16, layers=1, heads=2, mlp_hidden=16, grid=2, patch_px=4
        )
    )


def make_fusion(kind: Any = "drorae") -> nn.Module:
    torch.manual_seed(4)
    return build_fusion(FusionConfig(kind=kind, expert_hidden=8), LAYERS, DIM)


def make_phase(name: str) -> TokenizerPhase:
    if name == "fusion":
        return fusion_phase(make_fusion(), make_decoder(), World())
    kind = "rae" if name == "decoder" else "drorae"
    return decoder_phase(name, make_fusion(kind), make_decoder(), World())


def make_critic(job: TokenizerTraining) -> Critic:
    torch.manual_seed(5)
    judge = build_discriminator(JUDGE)
    return Critic(judge, job.adversarial, num_steps=job.num_steps, world=World(), seed=0)


@pytest.mark.parametrize("name", ["decoder", "fusion", "finetune"])
def test_a_phase_lowers_its_loss_and_changes_only_what_it_trains(
    name: str, tokenizer_batches: Callable, make_tools: Callable
) -> None:
    phase, log = make_phase(name), Rows()
    decoder = phase.trainable if name != "fusion" else phase.decode
    fusion = phase.encode if name == "fusion" else None
    before = {k: v.clone() for k, v in phase.trainable.state_dict().items()}
    frozen = {k: v.clone() for k, v in (decoder if fusion else make_fusion()).state_dict().items()}
    job = dataclasses.replace(JOB, num_steps=40, noise_tau=0.0)
    train_tokenizer(job, phase, tokenizer_batches(40, 4), None, make_tools(log=log), seed=0)
    losses = list(log.series("train/l1").values())
    assert sum(losses[-6:]) < sum(losses[:6])
    assert any(not torch.equal(before[k], v) for k, v in phase.trainable.state_dict().items())
    norms = list(log.series("train/router_norm").values())
    assert all(0.3 < norm < 3 for norm in norms)  # starts at 1
    assert bool(norms) == (name != "decoder")
    if name == "fusion":
        assert all(torch.equal(frozen[k], v) for k, v in decoder.state_dict().items())


@pytest.mark.parametrize("name", ["decoder", "fusion"])
@pytest.mark.parametrize("adversarial", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    name: str, adversarial: bool, tokenizer_batches: Callable, make_tools: Callable
) -> None:
    job = JOB
    if adversarial:
        job = dataclasses.replace(
            JOB, adversarial=AdversarialConfig(weight=0.5, discriminator=JUDGE, start_step=2)
        )

    def run(checkpoints: MemoryCheckpoints, num_batches: int, log: Rows) -> Any:
        phase = make_phase(name)
        critic = make_critic(job) if adversarial else None
        tools = make_tools(checkpoints, log)
        batches = tokenizer_batches(num_batches, 4)
        report = train_tokenizer(job, phase, batches, None, tools, seed=0, critic=critic)
        return phase.trainable.state_dict(), report

    straight_log, resumed_log = Rows(), Rows()
    straight, straight_report = run(MemoryCheckpoints(), 6, straight_log)
    kept = MemoryCheckpoints(every=3)
    run(kept, 4, Rows())  # dies after step 4, one step behind its checkpoint
    resumed, resumed_report = run(kept, 6, resumed_log)

    assert min(resumed_log.series("train/loss")) == 4
    for step, loss in resumed_log.series("train/loss").items():
        assert loss == straight_log.series("train/loss")[step]
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)
    for key, value in straight_report.ema.items():
        assert torch.equal(value, resumed_report.ema[key])
    steps = [row["step"] for row in resumed_report.history]
    assert steps == [row["step"] for row in straight_report.history]


def test_the_adversarial_term_reaches_generator_and_discriminator(
    tokenizer_batches: Callable, make_tools: Callable
) -> None:
    job = dataclasses.replace(JOB, adversarial=AdversarialConfig(weight=0.5, discriminator=JUDGE))
    critic, log = make_critic(job), Rows()
    before = {k: v.clone() for k, v in critic.state_dict()["module"].items()}
    tools = make_tools(log=log)
    train_tokenizer(
        job, make_phase("decoder"), tokenizer_batches(6, 4), None, tools, seed=0, critic=critic
    )
    plain = Rows()
    tools = make_tools(log=plain)
    train_tokenizer(JOB, make_phase("decoder"), tokenizer_batches(6, 4), None, tools, seed=0)
    assert log.series("train/gan_weight")[1] > 0
    assert log.series("train/l1")[1] == plain.series("train/l1")[1]
    assert log.series("train/l1")[3] != plain.series("train/l1")[3]
    after = critic.state_dict()["module"]
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_pulls_balance_to_the_gradient_of_the_weighted_sum() -> None:
    job = dataclasses.replace(JOB, adversarial=AdversarialConfig(weight=0.5, discriminator=JUDGE))
    decoder, tokens, target = make_decoder(), torch.randn(2, TOKENS, DIM), torch.rand(2, 3, 8, 8)
    weight, positions, critic = decoder.decoder_pred.weight, torch.tensor([3, 7]), make_critic(job)
    recon, features = decoder(tokens, with_features=True)
    images = recon.detach().requires_grad_()
    to_weight = partial(decoder.last_layer_gradient, features)
    pull = critic.pull((images - target).abs().mean(), images, to_weight, positions, step=0)
    (gradient,), terms = critic.balance([pull])
    cheap = torch.autograd.grad(recon, weight, gradient)[0]

    recon = decoder(tokens)
    module = critic._module.eval()
    draws = critic._draws(0, "generator", positions)
    gan = generator_loss(module(augment(to_signed(recon), draws)))
    by_loss = torch.autograd.grad((recon - target).abs().mean(), weight, retain_graph=True)[0]
    by_gan = torch.autograd.grad(gan, weight, retain_graph=True)[0]
    adaptive = by_loss.norm() / (by_gan.norm() + 1e-6)
    torch.testing.assert_close(terms["gan_weight"], adaptive, rtol=1e-5, atol=0)
    torch.testing.assert_close(cheap, by_loss + 0.5 * adaptive * by_gan, rtol=1e-5, atol=1e-8)


def test_augmentation_is_drawn_by_place_in_the_global_batch() -> None:
    job = dataclasses.replace(JOB, adversarial=AdversarialConfig(weight=0.5, discriminator=JUDGE))
    critic = make_critic(job)
    whole = critic._draws(3, "real", torch.arange(6))
    assert torch.equal(whole[[4, 1]], critic._draws(3, "real", torch.tensor([4, 1])))
    assert not torch.equal(whole, critic._draws(4, "real", torch.arange(6)))
    assert not torch.equal(whole, critic._draws(3, "fake", torch.arange(6)))
    many = critic._draws(0, "fake", torch.arange(4000))
    assert many.min() >= 0
    assert many.max() < 1
    # 4000 uniform draws: the mean of each column is known to 0.005
    torch.testing.assert_close(many.mean(0), torch.full((5,), 0.5), atol=0.03, rtol=0)


def test_a_non_finite_loss_names_its_step_and_keeps_the_last_good_weights(
    tokenizer_batches: Callable, make_tools: Callable
) -> None:
    phase = make_phase("decoder")

    def poisoned(recon: Tensor, images: Tensor) -> Tensor:
        poisoned.calls += 1  # type: ignore[attr-defined]
        scale = float("nan") if poisoned.calls == 3 else 1.0  # type: ignore[attr-defined]
        return (recon - images).abs().mean((1, 2, 3)) * scale

    poisoned.calls = 0  # type: ignore[attr-defined]
    job = dataclasses.replace(JOB, lpips_weight=1.0)
    with pytest.raises(RuntimeError, match=r"decoder: .*not finite at step 2"):
        train_tokenizer(job, phase, tokenizer_batches(6, 4), poisoned, make_tools(), seed=0)
    assert all(torch.isfinite(v).all() for v in phase.trainable.state_dict().values())


def test_evaluators_see_online_weights_and_average_and_the_loop_goes_on_with_the_former(
    tokenizer_batches: Callable, make_tools: Callable
) -> None:
    phase, seen = make_phase("decoder"), []

    def look(step: int, prefix: str) -> dict[str, float]:
        seen.append((step, prefix, phase.trainable.decoder_pred.weight.detach().clone()))
        assert not phase.trainable.training
        return {f"{prefix}/x": float(step)}

    tools = make_tools(evaluators=[look])
    report = train_tokenizer(JOB, phase, tokenizer_batches(6, 4), None, tools, seed=0)
    assert [(s, name) for s, name, _ in seen] == [
        (s, name) for s in (3, 6) for name in ("eval_online", "eval")
    ]
    assert torch.equal(seen[-1][2], report.ema["decoder_pred.weight"])
    assert torch.equal(seen[-2][2], phase.trainable.decoder_pred.weight)
    assert not torch.equal(seen[-1][2], seen[-2][2])
    assert phase.trainable.training
    both = {"eval/x": 6.0, "eval_online/x": 6.0}
    assert {"step": 6, **both, **{f"best/{k}": v for k, v in both.items()}} in report.history


def test_noise_depends_on_the_index_not_on_the_batch() -> None:
    latent = torch.zeros(4, TOKENS, DIM)
    whole = noised(latent, JOB, 0, torch.arange(4))
    part = noised(latent[2:], JOB, 0, torch.arange(2, 4))
    assert torch.equal(whole[2:], part)
    assert not torch.equal(noised(latent, JOB, 1, torch.arange(4)), whole)
    quiet = dataclasses.replace(JOB, noise_tau=0.0)
    assert noised(latent, quiet, 0, torch.arange(4)) is latent


@pytest.mark.parametrize(("kind", "mean"), [("uniform", 0.4), ("half_normal", 0.638)])
def test_noise_scales_follow_their_law(kind: Any, mean: float) -> None:
    job = dataclasses.replace(JOB, noise_kind=kind)
    sigma = (
        noised(torch.zeros(2000, 1, 64), job, 0, torch.arange(2000)).square().mean((1, 2)).sqrt()
    )
    # 2000 draws with standard deviation 0.23 and 0.48: the mean is known to about 0.01
    assert sigma.mean().item() == pytest.approx(mean, abs=0.03)
    if kind == "uniform":
        assert sigma.max().item() < 1.0


@pytest.mark.parametrize(
    "fields", [{"num_steps": 0}, {"ema_decay": 1.0}, {"noise_tau": -1.0}, {"batch_images": 0}]
)
def test_impossible_phases_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        dataclasses.replace(JOB, **fields)


def test_a_generator_that_starts_before_its_judge_is_refused() -> None:
    with pytest.raises(ValueError, match="learn_from_step=5"):
        AdversarialConfig(weight=1.0, start_step=2, learn_from_step=5)
    with pytest.raises(ValueError, match="weight"):
        AdversarialConfig(weight=-1.0)


def test_starts_in_epochs_become_steps() -> None:
    config = AdversarialConfig(weight=1.0, start_epoch=8.0, learn_from_epoch=6.0)
    found = config.in_steps(2502)
    assert (found.start_step, found.learn_from_step) == (20_016, 15_012)
    assert found.in_steps(7) == found
    mixed = AdversarialConfig(weight=1.0, start_step=30, learn_from_epoch=1.5).in_steps(10)
    assert (mixed.start_step, mixed.learn_from_step) == (30, 15)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start_step": 5, "start_epoch": 1.0}, "start_step=5 and start_epoch=1.0 are both given"),
        ({"learn_from_epoch": 2.0, "start_epoch": 1.0}, "learn_from_epoch=2.0 lies after"),
        ({"start_epoch": -1.0}, "start_epoch=-1.0: expected 0 or more"),
    ],
)
def test_starts_that_contradict_each_other_are_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        AdversarialConfig(weight=1.0, **fields)
    late = AdversarialConfig(weight=1.0, start_step=5, learn_from_epoch=1.0)
    with pytest.raises(ValueError, match="learn_from_step=10 lies after start_step=5"):
        late.in_steps(10)


@pytest.mark.parametrize(("span", "last"), [("learning", 0.1), ("phase", 0.55)])
def test_the_discriminators_schedule_spans_its_own_steps_or_the_phase(
    span: Any, last: float
) -> None:
    optim = OptimConfig(lr=1.0, final_lr=0.1, schedule="linear", betas=(0.9, 0.95))
    adversarial = AdversarialConfig(
        weight=0.5,
        discriminator=JUDGE,
        start_step=50,
        learn_from_step=50,
        optim=optim,
        schedule_span=span,
    )
    job = dataclasses.replace(JOB, num_steps=100, adversarial=adversarial)
    critic = make_critic(job)
    images = torch.rand(2, 3, 8, 8)
    critic.update([Judged(images, images, torch.arange(2))], 99)
    # 49 of 50 or of 100 own steps lie behind: RAE's rate ends at about 0.4 of its start
    rate = critic.state_dict()["optimizer"]["param_groups"][0]["lr"]
    assert rate == pytest.approx(last, abs=0.02)


def test_crops_with_kept_states_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden_states=disk cannot keep states"):
        dataclasses.replace(JOB, view="random_crop", hidden_states="disk")


def test_states_that_a_batch_lacks_are_computed_outside_of_autocast(
    tokenizer_batches: Callable, make_tools: Callable
) -> None:
    given, lacking = tokenizer_batches(6, 4), tokenizer_batches(6, 4)
    states: dict[float, Tensor] = {}

    def without(start: int) -> Any:
        for batch in lacking(start):
            states[float((batch.images / 255.0).sum())] = batch.hidden.float()
            batch.hidden = None
            yield batch

    def see(images: Tensor) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()
        return states[float(images.sum())]

    job = dataclasses.replace(JOB, precision="bfloat16")
    reports = [
        train_tokenizer(job, make_phase("fusion"), batches, None, make_tools(), seed=0, see=see).ema
        for batches in (given, without)
    ]
    assert all(torch.equal(value, reports[1][name]) for name, value in reports[0].items())
