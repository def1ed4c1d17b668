"""Between two log points no loop reads from the device and no copy to it is waited for."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from loop_fakes import STATS
from test_diffusion import JOB as DIFFUSION
from test_diffusion import make_model
from test_tokenizer import JOB, JUDGE, make_decoder, make_fusion
from torch.utils._python_dispatch import TorchDispatchMode

from drorae.config import Compute
from drorae.models.discriminator import build_discriminator
from drorae.training.critic import Critic
from drorae.training.diffusion import train_diffusion
from drorae.training.jobs import AdversarialConfig
from drorae.training.loop import LoopTools
from drorae.training.tokenizer import TokenizerPhase, decoder_phase, fusion_phase, train_tokenizer
from drorae.training.world import World

SHAPES_ONLY = torch.device("meta")
"""A device whose tensors have no values: reading one is an error, as a wait would be on a GPU."""
ADVERSARIAL = AdversarialConfig(weight=0.5, discriminator=JUDGE, start_step=1, learn_from_step=0)


class Copies(TorchDispatchMode):
    """Collects copies from the CPU to another device that hold up the host."""

    def __init__(self) -> None:
        super().__init__()
        self.blocking: list[Any] = []

    def of_steps(self, batches: Callable[[int], Iterator[Any]]) -> Callable[[int], Iterator[Any]]:
        """The same batches; what was copied before the first one does not count."""

        def make(start: int) -> Iterator[Any]:
            self.blocking.clear()
            yield from batches(start)

        return make

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        source = args[1] if func is torch.ops.aten.copy_.default else args[0] if args else None
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            waits = not (kwargs or {}).get("non_blocking", len(args) > 2 and args[2])
            if source.device.type == "cpu" and out.device.type != "cpu" and waits:
                self.blocking.append((func, tuple(source.shape)))
        return out


@pytest.fixture
def on_shapes(make_tools: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LoopTools]:
    # The fused optimiser has shape functions; only its list of devices leaves them out.
    optimizers = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["meta"])

    def make(**compute: Any) -> LoopTools:
        settings = Compute(**{"log_every_steps": 100} | compute)
        world = World(device=SHAPES_ONLY)
        return dataclasses.replace(make_tools(), world=world, compute=settings)

    return make


def run_diffusion(batches: Any, tools: LoopTools, device: torch.device) -> None:
    model = make_model().to(device)
    train_diffusion(DIFFUSION, model, batches, tools, stats=STATS, stage="diffusion", seed=0)


def phase_on(name: str, world: World) -> TokenizerPhase:
    if name == "fusion":
        return fusion_phase(make_fusion(), make_decoder(), world)
    return decoder_phase(name, make_fusion("rae"), make_decoder(), world)


def run_tokenizer(name: str, batches: Any, tools: LoopTools, *, adversarial: bool) -> None:
    job, critic = dataclasses.replace(JOB, eval_every_steps=100, lpips_weight=1.0), None
    if adversarial:
        job = dataclasses.replace(job, adversarial=ADVERSARIAL)
        judge = build_discriminator(JUDGE)
        critic = Critic(judge, ADVERSARIAL, num_steps=6, world=tools.world, seed=0)

    def lpips(recon: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return (recon - images).square().mean((1, 2, 3))

    train_tokenizer(job, phase_on(name, tools.world), batches, lpips, tools, seed=0, critic=critic)


@pytest.mark.parametrize("parts", [1, 2])
def test_diffusion_steps_wait_for_nothing(
    parts: int, latent_batches: Callable, on_shapes: Callable
) -> None:
    tools = on_shapes(accumulate_steps=parts)
    with Copies() as copies:
        run_diffusion(copies.of_steps(latent_batches(3, 6)), tools, SHAPES_ONLY)
    assert copies.blocking == []


@pytest.mark.parametrize("adversarial", [False, True])
@pytest.mark.parametrize("name", ["decoder", "fusion"])
def test_tokenizer_steps_wait_for_nothing(
    name: str, adversarial: bool, tokenizer_batches: Callable, on_shapes: Callable
) -> None:
    tools = on_shapes(accumulate_steps=2 if adversarial else 1)
    with Copies() as copies:
        batches = copies.of_steps(tokenizer_batches(3, 4))
        run_tokenizer(name, batches, tools, adversarial=adversarial)
    assert copies.blocking == []


def test_a_log_point_does_wait(latent_batches: Callable, on_shapes: Callable) -> None:
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        run_diffusion(latent_batches(3, 6), on_shapes(log_every_steps=2), SHAPES_ONLY)


def test_a_copy_that_holds_up_the_host_is_noticed() -> None:
    with Copies() as copies:
        torch.ones(3).to(SHAPES_ONLY)
        torch.ones(2).to(SHAPES_ONLY, non_blocking=True)
    assert [shape for _, shape in copies.blocking] == [(3,)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["diffusion", "decoder", "fusion"])
def test_steps_on_a_gpu_synchronise_nowhere(
    name: str, latent_batches: Callable, tokenizer_batches: Callable, make_tools: Callable
) -> None:
    cuda = torch.device("cuda")
    tools = dataclasses.replace(
        make_tools(), world=World(device=cuda), compute=Compute(log_every_steps=100)
    )

    def strict(batches: Callable[[int], Iterator[Any]]) -> Callable[[int], Iterator[Any]]:
        def make(start: int) -> Iterator[Any]:
            for batch in batches(start):
                # The first steps may allocate, initialise libraries and start the critic.
                torch.cuda.set_sync_debug_mode("error" if batch.step >= 3 else "default")
                yield batch
            torch.cuda.set_sync_debug_mode("default")

        return make

    try:
        if name == "diffusion":
            run_diffusion(strict(latent_batches(5, 6)), tools, cuda)
        else:
            run_tokenizer(name, strict(tokenizer_batches(5, 4)), tools, adversarial=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
