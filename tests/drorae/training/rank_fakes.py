"""Training loops in processes of their own: one per rank, joined by gloo.

`start` starts ranks that run a task of this module and collects what they return. A task is killed
by SIGKILL when it is about to ask for the batch of step `kill_at`.
"""

import hashlib
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from loop_fakes import DIM, LAYERS, SAMPLES, SIDE, STATS, TOKENS, Rows, digest_of, ids_of
from torch import Tensor, nn

from drorae.checkpoint import TrainingCheckpoints
from drorae.config import Compute
from drorae.data.order import rank_slice
from drorae.models.decoder import Decoder, DecoderConfig
from drorae.models.discriminator import DiscriminatorConfig, build_discriminator
from drorae.models.dit import DiT, DiTConfig
from drorae.models.fusion import FusionConfig, build_fusion
from drorae.tracking import NullTracker
from drorae.training import parallel
from drorae.training.critic import Critic
from drorae.training.diffusion import train_diffusion
from drorae.training.evaluators import reconstruction_evaluator
from drorae.training.jobs import AdversarialConfig, DiffusionStage, OptimConfig, TokenizerTraining
from drorae.training.loop import LoopTools, TrainReport
from drorae.training.parallel import unwrapped, whole
from drorae.training.tokenizer import (
    TokenizerPhase,
    decoder_phase,
    fusion_phase,
    train_tokenizer,
)
from drorae.training.world import World

multiprocessing.set_forkserver_preload([__name__])

BATCH = 8
JUDGE = DiscriminatorConfig(
    source="random", input_px=8, patch_px=4, width=8, depth=2, heads=2, taps=(1, 2), kernel=3
)
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.05, clip_norm=1.0, final_lr=1e-3)
TOKENIZER = TokenizerTraining(
    num_steps=6,
    batch_images=BATCH,
    optim=OPTIM,
    lpips_weight=0.0,
    ema_decay=0.5,
    eval_every_steps=2,
    adversarial=AdversarialConfig(
        weight=0.5, discriminator=JUDGE, learn_from_step=0, start_step=1, optim=OPTIM
    ),
)
DIFFUSION = DiffusionStage(
    model=DiTConfig(
        input_size=2,
        in_channels=8,
        hidden_size=(16, 16),
        depth=(2, 1),
        num_heads=(2, 2),
        num_classes=3,
    ),
    num_steps=6,
    batch_images=BATCH,
    optim=OPTIM,
    ema_decay=0.5,
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run of a loop."""

    name: str
    """`decoder`, `fusion`, `finetune` or `diffusion`."""
    folder: str = ""
    """Where checkpoints go; empty: nowhere."""
    num_steps: int = 6
    lr: float = 1e-2
    """Peak learning rate of both networks."""
    kill_at: int = -1
    """Step before which rank 0 dies; a negative one: never."""
    stop_at: int = -1
    """Step before which all ranks return, as if the data ended."""
    dropout: float = 0.0
    """Of the fusion's router: draws from torch's global generator."""
    compute: Compute = field(default_factory=lambda: Compute(log_every_steps=1, save_every_steps=3))


@dataclass
class Outcome:
    """What rank 0 of a task hands back."""

    history: list[dict[str, float]]
    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    gradients: dict[str, Tensor]
    judge: dict[str, Tensor]
    """The discriminator's gradients."""
    ids: list[tuple[int, list[int]]]
    """Steps and the ids of their global batches, as this rank's loop was given them."""

    def series(self, name: str) -> dict[int, float]:
        return {int(row["step"]): row[name] for row in self.history if name in row}

    def sha256(self) -> dict[str, str]:
        return {
            name: hashlib.sha256(
                b"".join(key.encode() + value.numpy().tobytes() for key, value in kept.items())
            ).hexdigest()
            for name, kept in (("weights", self.weights), ("ema", self.ema))
        }


class Nowhere:
    """No checkpoints."""

    def latest(self) -> None:
        return None

    def due(self, step: int) -> bool:
        return False

    def overdue(self) -> bool:
        return False

    def save(self, step: int, state: dict[str, Any]) -> None:
        raise AssertionError


def start(*tasks: Task, world_size: int = 1) -> list[Outcome]:
    """Run tasks one after the other in the same fresh processes; rank 0's outcomes.

    Raises:
        ProcessExitedException: A process was killed.
    """
    # Processes are forked from one that has imported this module and done nothing else; it is
    # started once and looks for the module on its own path.
    path = mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    with tempfile.TemporaryDirectory() as folder, path:
        arguments = (world_size, tasks, folder)
        multiprocessing.start_processes(_rank, arguments, world_size, start_method="forkserver")
        return pickle.loads((Path(folder) / "outcomes.pickle").read_bytes())


def _rank(rank: int, world_size: int, tasks: tuple[Task, ...], folder: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    parallel.COMPILE_BACKEND = "aot_eager"
    if world_size > 1:
        store = dist.FileStore(f"{folder}/store", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    world = World(rank=rank, world_size=world_size)
    outcomes = [run(task, world) for task in tasks]
    if rank == 0:
        (Path(folder) / "outcomes.pickle").write_bytes(pickle.dumps(outcomes))
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def run(task: Task, world: World) -> Outcome:
    """One loop on this rank."""
    log = Rows()
    compute = task.compute
    checkpoints: Any = Nowhere()
    if task.folder:
        checkpoints = TrainingCheckpoints(
            work_uri=task.folder, every_steps=compute.save_every_steps, every_s=1e9, keep=2
        )
    tools = LoopTools(
        world=world,
        compute=compute,
        checkpoints=checkpoints,
        log=log,
        progress=lambda done, total: None,
    )
    seen: list[tuple[int, list[int]]] = []

    def batches(first: int) -> Iterator[Any]:
        for step in range(first, task.num_steps):
            if step == task.stop_at:
                break
            if step == task.kill_at and world.is_main:
                if task.folder:
                    checkpoints.wait()
                os.kill(os.getpid(), signal.SIGKILL)
            yield _batch(task.name, step, world, seen)

    torch.manual_seed(3)
    report, module, critic = _train(task, world, tools, batches)
    if task.folder:
        checkpoints.wait()
    return Outcome(
        history=report.history,
        weights={k: v.clone() for k, v in report.weights.items()},
        ema={k: v.clone() for k, v in report.ema.items()},
        gradients=_gradients(module),
        judge=_gradients(critic._module) if critic else {},
        ids=seen,
    )


def _train(
    task: Task, world: World, tools: LoopTools, batches: Any
) -> tuple[TrainReport, nn.Module, Critic | None]:
    optim = replace(OPTIM, lr=task.lr, final_lr=task.lr / 10)
    if task.name == "diffusion":
        job = replace(DIFFUSION, num_steps=task.num_steps, optim=optim)
        model = DiT(job.model)
        with torch.no_grad():
            model.final_layer.linear.weight.normal_(std=0.1)  # a fresh model is zero
        report = train_diffusion(job, model, batches, tools, stats=STATS, stage="diffusion", seed=0)
        return report, model, None
    adversarial = replace(TOKENIZER.adversarial, optim=optim)
    job = replace(TOKENIZER, num_steps=task.num_steps, optim=optim, adversarial=adversarial)
    phase = _phase(task, world)
    critic = Critic(
        build_discriminator(JUDGE), job.adversarial, num_steps=job.num_steps, world=world, seed=0
    )
    show = reconstruction_evaluator(phase, HeldOut(), world)  # pyright: ignore[reportArgumentType]
    tools = replace(tools, evaluators=[partial(show, NullTracker())])
    report = train_tokenizer(job, phase, batches, None, tools, seed=0, critic=critic)
    return report, phase.trainable, critic


class HeldOut:
    """Three images with their hidden states: they divide over no two ranks."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(8)
        shape = (3, 3, SIDE, SIDE)
        self.images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        self.hidden = torch.randn(3, LAYERS, TOKENS, DIM, generator=generator).half()
        self.shards = SimpleNamespace(read=lambda ids: (self.images[ids], None))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, ids: np.ndarray) -> Tensor:
        return self.hidden[ids]


def _phase(task: Task, world: World) -> TokenizerPhase:
    shape = DecoderConfig(
        latent_channels=DIM, width=16, layers=2, heads=2, mlp_hidden=16, grid=2, patch_px=4
    )
    decoder = Decoder(shape)
    kind: Any = "rae" if task.name == "decoder" else "drorae"
    fusion = build_fusion(
        FusionConfig(kind=kind, expert_hidden=8, router_dropout=task.dropout), LAYERS, DIM
    )
    if task.name == "fusion":
        return fusion_phase(fusion, decoder, world, task.compute)
    return decoder_phase(task.name, fusion, decoder, world, task.compute)


def _batch(name: str, step: int, world: World, seen: list[tuple[int, list[int]]]) -> Any:
    # With seed 1 one of the fakes lies on the edge between two of its 8-bit values.
    generator = torch.Generator().manual_seed(2)
    ids = ids_of(step, BATCH, 0)
    mine = rank_slice(ids, world.rank, world.world_size)
    seen.append((step, gathered(mine.tolist(), world)))
    places = torch.from_numpy(rank_slice(torch.arange(BATCH).numpy(), world.rank, world.world_size))
    common = {"step": step, "positions": places, "ids_digest": digest_of(ids)}
    if name == "diffusion":
        latents = torch.randn(SAMPLES, 8, 2, 2, generator=generator).half()
        labels = torch.randint(0, 3, (SAMPLES,), generator=generator)
        return SimpleNamespace(**common, latents=latents[mine], labels=labels[mine])
    images = torch.randint(256, (SAMPLES, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    hidden = torch.randn(SAMPLES, LAYERS, TOKENS, DIM, generator=generator).half()
    return SimpleNamespace(**common, images=images[mine], hidden=hidden[mine])


def gathered(ids: list[int], world: World) -> list[int]:
    """The ids that all ranks loaded, in rank order."""
    if world.world_size == 1:
        return ids
    parts: list[Any] = [None] * world.world_size
    dist.all_gather_object(parts, ids)
    return [number for part in parts for number in part]


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    named = unwrapped(module).named_parameters()
    return {name: whole(p.grad).clone() for name, p in named if p.grad is not None}
