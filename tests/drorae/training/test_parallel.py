import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_fakes import DIM, STATS, TOKENS, MemoryCheckpoints, Rows
from test_diffusion import JOB as DIFFUSION
from test_diffusion import make_model
from test_tokenizer import JOB, make_decoder, make_fusion
from torch import distributed as dist
from torch import nn

from drorae.config import Compute
from drorae.models.decoder import Decoder
from drorae.training import parallel
from drorae.training.diffusion import train_diffusion
from drorae.training.jobs import TokenizerTraining
from drorae.training.loop import LoopTools
from drorae.training.tokenizer import TokenizerPhase, decoder_phase, fusion_phase, train_tokenizer
from drorae.training.world import World, part_slices, wrap_ddp

COMPILED = Compute(log_every_steps=1, compile=True)


def make_phase(name: str, compute: Compute) -> TokenizerPhase:
    if name == "fusion":
        return fusion_phase(make_fusion(), make_decoder(), World(), compute)
    return decoder_phase(name, make_fusion("rae"), make_decoder(), World(), compute)


def run(
    name: str, compute: Compute, batches: Any, tools: LoopTools, job: TokenizerTraining = JOB
) -> tuple[Rows, Any]:
    log = Rows()
    tools = dataclasses.replace(tools, log=log, compute=compute)
    return log, train_tokenizer(job, make_phase(name, compute), batches, None, tools, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decoder", "fusion"])
def test_a_compiled_loop_computes_the_same(
    name: str,
    tokenizer_batches: Callable,
    make_tools: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parallel, "COMPILE_BACKEND", "aot_eager")
    plain, report = run(name, Compute(log_every_steps=1), tokenizer_batches(6, 4), make_tools())
    compiled, other = run(name, COMPILED, tokenizer_batches(6, 4), make_tools())
    expected = plain.series("train/loss")
    assert compiled.series("train/loss") == pytest.approx(expected, rel=1e-4)
    assert other.weights.keys() == report.weights.keys()


@pytest.mark.slow
def test_a_compiled_network_is_evaluated_with_the_average_and_then_trained_on(
    tokenizer_batches: Callable, make_tools: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "COMPILE_BACKEND", "aot_eager")
    phase, seen = make_phase("decoder", COMPILED), {}
    tokens = torch.randn(2, TOKENS, DIM)

    def look(step: int, prefix: str) -> dict[str, float]:
        seen[step, prefix] = phase.decode(tokens)
        return {}

    tools = dataclasses.replace(make_tools(evaluators=[look]), compute=COMPILED)
    report = train_tokenizer(JOB, phase, tokenizer_batches(6, 4), None, tools, seed=0)
    for prefix, weights in (
        ("eval", {**report.weights, **report.ema}),
        ("eval_online", report.weights),
    ):
        plain = make_decoder().eval()
        plain.load_state_dict(weights)
        torch.testing.assert_close(seen[6, prefix], plain(tokens), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(seen[6, "eval"], seen[6, "eval_online"], atol=1e-4)


def test_recomputation_reaches_every_network_that_knows_it(
    latent_batches: Callable, make_tools: Callable
) -> None:
    compute = Compute(log_every_steps=1, activation_checkpointing=True)
    decoder, fusion = make_decoder(), make_fusion()
    fusion_phase(fusion, decoder, World(), compute)
    assert decoder.recompute
    assert fusion.experts.recompute
    model, plain = make_model(), make_model()
    losses = []
    for network, settings in ((model, compute), (plain, Compute(log_every_steps=1))):
        log = Rows()
        tools = dataclasses.replace(make_tools(log=log), compute=settings)
        train_diffusion(
            DIFFUSION, network, latent_batches(6, 6), tools, stats=STATS, stage="diffusion", seed=0
        )
        losses.append(log.series("train/loss"))
    assert model.activation_checkpointing
    assert not plain.activation_checkpointing
    assert losses[0] == losses[1]


def test_one_rank_needs_no_wrapper() -> None:
    decoder = make_decoder()
    for sharding in ("none", "ddp", "fsdp2"):
        assert parallel.distribute(decoder, World(), Compute(sharding=sharding)) is decoder
    assert isinstance(decoder, Decoder)
    assert not parallel.is_sharded(decoder)


def test_plain_tensors_are_their_own_shards() -> None:
    tensor = nn.Parameter(torch.ones(2))
    assert parallel.local(tensor) is parallel.whole(tensor) is tensor
    assert torch.equal(parallel.sharded_like(torch.zeros(2), tensor), torch.zeros(2))


def test_parts_are_equal_or_refused() -> None:
    assert part_slices(6, 3) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    with pytest.raises(ValueError, match="accumulate_steps=4 does not divide the 6 images"):
        part_slices(6, 4)
    with pytest.raises(ValueError, match=r"batch_images=36 .* 4 workers in .*=2 parts.* 32 or 40"):
        World(rank=0, world_size=4).local_batch(36, "batch_images", 2)


def test_time_for_a_checkpoint_is_told_to_all_at_a_log_point(
    latent_batches: Callable, make_tools: Callable
) -> None:
    class Late(MemoryCheckpoints):
        def overdue(self) -> bool:
            return not self.saved

    kept = Late(every=100)
    tools = dataclasses.replace(make_tools(kept), compute=Compute(log_every_steps=4))
    train_diffusion(
        DIFFUSION, make_model(), latent_batches(6, 6), tools, stats=STATS, stage="guide", seed=0
    )
    assert list(kept.saved) == [4]


def test_checkpoints_of_an_older_format_are_refused(
    latent_batches: Callable, make_tools: Callable
) -> None:
    kept = MemoryCheckpoints(saved={3: {"step": 3, "module": {}, "history": []}})
    with pytest.raises(RuntimeError, match="guide: the training checkpoint has format 1"):
        train_diffusion(
            DIFFUSION,
            make_model(),
            latent_batches(6, 6),
            make_tools(kept),
            stats=STATS,
            stage="guide",
            seed=0,
        )


def test_ddp_sends_no_buffers_and_is_not_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(rank=0, world_size=2)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        # Warnings are errors here.
        assert not wrap_ddp(nn.BatchNorm1d(2), world).broadcast_buffers
    finally:
        dist.destroy_process_group()

    class Older:
        """As in torch 2.11."""

        def __init__(self, module: nn.Module, broadcast_buffers: bool = True) -> None:
            self.broadcast_buffers = broadcast_buffers

    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Older)
    assert not wrap_ddp(nn.BatchNorm1d(2), world).broadcast_buffers
