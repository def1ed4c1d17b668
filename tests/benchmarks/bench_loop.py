"""Overhead of the training loops: against a bare loop of the same network, and of checkpoints.

The bare loop does what anybody would write: forward, loss, backward, clip, AdamW, EMA. Its steps
are run between those of the stage's loop, on the same module, so that neither a busy machine nor
where the weights lie in memory favours one of them.
On a GPU the device is waited for after every step of either, which hides nothing.
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from bench_timing import synchronise
from torch import Tensor, nn

from drorae.checkpoint import TrainingCheckpoints
from drorae.config import Compute
from drorae.diffusion.interpolation import add_noise
from drorae.losses.perceptual import PerceptualLoss
from drorae.models.decoder import Decoder
from drorae.models.decoder_config import decoder_preset
from drorae.models.dit import DiT
from drorae.models.dit_config import dit_preset
from drorae.models.fusion import FusionConfig, build_fusion
from drorae.recipes.smoke import smoke
from drorae.training.diffusion import train_diffusion
from drorae.training.jobs import DecoderStage, DiffusionStage, FusionStage, TokenizerTraining
from drorae.training.loop import LoopTools
from drorae.training.tokenizer import decoder_phase, fusion_phase, train_tokenizer
from drorae.training.world import World

ALEXNET = ((3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3))
LAYERS = 12
WARM_UP = 3  # steps that are not counted: allocation, lazy initialisation
Step = Callable[[], None]


@dataclass
class Timed:
    """Batches of a stage's loop that run and time a bare step after each of its steps."""

    make: Callable[[int], Any]
    bare: Step
    num_steps: int
    device: torch.device
    stage_s: list[float] = field(default_factory=list)
    bare_s: list[float] = field(default_factory=list)

    def __call__(self, first: int) -> Iterator[Any]:
        for step in range(first, self.num_steps):
            batch = self.make(step)
            synchronise(self.device)
            start = time.perf_counter()
            yield batch
            synchronise(self.device)
            middle = time.perf_counter()
            self.bare()
            synchronise(self.device)
            self.stage_s.append(middle - start)
            self.bare_s.append(time.perf_counter() - middle)

    def ratio(self) -> float:
        """Lower quartile of the stage's step times over that of the bare ones.

        Other work on the machine only ever adds time, so the lower end says most.
        """
        stage, bare = (
            statistics.quantiles(times[WARM_UP:], n=4)[0] for times in (self.stage_s, self.bare_s)
        )
        return stage / bare


class Measured(TrainingCheckpoints):
    """Checkpoints that record how long the loop stands still and how long a write takes."""

    def measure(self, step: int, state: dict[str, Any]) -> tuple[float, float]:
        start = time.perf_counter()
        self.save(step, state)
        blocked_s = time.perf_counter() - start
        self.wait()
        return blocked_s, time.perf_counter() - start


def rows(device: torch.device, sizes: str, repeats: int) -> Iterator[dict]:
    """One row for each loop."""
    yield _row("diffusion", _diffusion, device, sizes, repeats)
    for stage in ("decoder", "fusion"):
        prepare = functools.partial(_tokenizer, stage=stage)
        yield _row(stage, prepare, device, sizes, repeats)
        bare_loss = functools.partial(prepare, lpips_weight=0.0)
        yield _row(f"{stage}, L1 alone", bare_loss, device, sizes, repeats)


def _row(name: str, prepare: Callable, device: torch.device, sizes: str, repeats: int) -> dict:
    num_steps = WARM_UP + 4 * repeats
    compute = Compute(save_every_steps=500)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Measured(work_uri=folder, every_steps=num_steps + 1, every_s=1e9, keep=2)
        last: dict[str, Any] = {}
        tools = LoopTools(
            world=World(device=device),
            compute=compute,
            checkpoints=_Keeping(checkpoints, num_steps - 1, last),
            log=lambda row, step: None,
            progress=lambda done, total: None,
        )
        timed = prepare(device, sizes, num_steps, tools)
        checkpoints.measure(1, last)  # fills the buffers, as the first save of a stage does
        blocked_s, whole_s = checkpoints.measure(2, last)
    step_s = statistics.median(timed.stage_s[WARM_UP:])
    interval_s = min(compute.save_every_steps * step_s, compute.save_every_s)
    return {
        "loop": name,
        "stage_ms": 1e3 * step_s,
        "bare_ms": 1e3 * statistics.median(timed.bare_s[WARM_UP:]),
        "stage_over_bare": timed.ratio(),
        "save_blocks_ms": 1e3 * blocked_s,
        "save_and_write_ms": 1e3 * whole_s,
        "blocked_share": blocked_s / interval_s,
        "share_if_writing_stopped_the_loop": whole_s / interval_s,
    }


@dataclass
class _Keeping:
    """Hands on one state of the loop, saves nothing."""

    checkpoints: TrainingCheckpoints
    at: int
    last: dict[str, Any]

    def latest(self) -> None:
        return None

    def due(self, step: int) -> bool:
        return step == self.at

    def overdue(self) -> bool:
        return False

    def save(self, step: int, state: dict[str, Any]) -> None:
        self.last |= state


def bare_step(module: nn.Module, loss_of: Callable[[], Tensor], optim: Any, decay: float) -> Step:
    """Forward, loss, backward, clip, AdamW, EMA; nothing else."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of().backward()
        if optim.clip_norm > 0:
            nn.utils.clip_grad_norm_(parameters, optim.clip_norm)
        optimizer.step()
        with torch.no_grad():
            for kept, parameter in zip(average, parameters, strict=True):
                kept.lerp_(parameter, 1 - decay)

    return step


def _diffusion(device: torch.device, sizes: str, num_steps: int, tools: LoopTools) -> Timed:
    job: DiffusionStage = replace(smoke().diffusion, num_steps=num_steps)
    if sizes == "full":
        job = replace(job, model=dit_preset("DiT-DH-XL"), batch_images=16)
    elif sizes == "tiny":
        job = replace(job, batch_images=2)
    shape = (job.batch_images, job.model.in_channels, job.model.input_size, job.model.input_size)
    latents, labels = torch.randn(shape).half(), torch.zeros(job.batch_images, dtype=torch.long)
    stats = {"mean": torch.zeros(shape[1:]), "var": torch.ones(shape[1:])}
    network = DiT(job.model).to(device).eval()

    def loss_of() -> Tensor:
        t, noise = torch.rand(len(latents), device=device), torch.randn(shape, device=device)
        clean = latents.to(device).float()
        velocity = network(add_noise(clean, noise, t), t, labels.to(device))
        return (velocity - (noise - clean)).square().mean()

    def make(step: int) -> Any:
        places = torch.arange(job.batch_images)
        return SimpleNamespace(
            step=step, positions=places, ids_digest=step, latents=latents, labels=labels
        )

    bare = bare_step(network, loss_of, job.optim, job.ema_decay)
    timed = Timed(make, bare, num_steps, device)
    train_diffusion(job, network, timed, tools, stats=stats, stage="diffusion", seed=0)
    return timed


def _perceptual() -> PerceptualLoss:
    """LPIPS of AlexNet's shapes; what its weights are does not change its time."""
    weights = {}
    for i, (channels, width, side) in enumerate(ALEXNET):
        spread = (channels * side**2) ** -0.5
        weights[f"trunk.{i}.weight"] = spread * torch.randn(width, channels, side, side)
        weights[f"trunk.{i}.bias"] = torch.zeros(width)
        weights[f"lin.{i}.weight"] = torch.rand(1, width, 1, 1) / width
    return PerceptualLoss(weights)


def _tokenizer(
    device: torch.device,
    sizes: str,
    num_steps: int,
    tools: LoopTools,
    *,
    stage: str,
    lpips_weight: float = 1.0,
) -> Timed:
    """The stage `decoder` reads one layer and trains the decoder, `fusion` reads all of them."""
    recipe = smoke()
    section: DecoderStage | FusionStage = getattr(recipe, stage)
    job: TokenizerTraining = replace(
        section.train,
        num_steps=num_steps,
        lpips_weight=lpips_weight,
        eval_every_steps=num_steps + 1,
        noise_tau=0.8,
    )
    shape, kind, num_layers = recipe.decoder.model, FusionConfig(kind="rae"), 1
    if stage == "fusion":
        kind, num_layers = recipe.fusion.model, LAYERS
    if sizes == "full":
        shape, kind = decoder_preset("ViT-XL"), replace(kind, expert_hidden=3072)
        job = replace(job, batch_images=16)
    elif sizes == "tiny":
        job = replace(job, batch_images=2)
    tokens, side = shape.grid**2, shape.grid * shape.patch_px
    images = torch.randint(256, (job.batch_images, 3, side, side), dtype=torch.uint8)
    hidden = torch.randn(job.batch_images, num_layers, tokens, shape.latent_channels).half()
    decoder = Decoder(shape).to(device)
    fusion = build_fusion(kind, num_layers, shape.latent_channels).to(device)
    lpips = _perceptual().to(device) if lpips_weight else None
    if stage == "fusion":
        trained, phase = fusion, fusion_phase(fusion, decoder, tools.world, tools.compute)
    else:
        trained, phase = decoder, decoder_phase(stage, fusion, decoder, tools.world, tools.compute)

    def loss_of() -> Tensor:
        with torch.set_grad_enabled(trained is fusion):
            latent = fusion(hidden.to(device).float()).latent
        sigma = job.noise_tau * torch.rand(len(latent), 1, 1, device=device)
        recon = decoder(latent + sigma * torch.randn_like(latent))
        targets = images.to(device) / 255.0
        loss = (recon - targets).abs().mean()
        return loss if lpips is None else loss + lpips_weight * lpips(recon, targets).mean()

    def make(step: int) -> Any:
        places = torch.arange(job.batch_images)
        return SimpleNamespace(
            step=step, positions=places, ids_digest=step, images=images, hidden=hidden
        )

    timed = Timed(make, bare_step(trained, loss_of, job.optim, job.ema_decay), num_steps, device)
    train_tokenizer(job, phase, timed, lpips, tools, seed=0)
    return timed
