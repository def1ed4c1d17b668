"""What the loop's thread does in a step, with the arithmetic of the device left out.

The loops run on the CPU with 32 latents or images of next to no elements: every operation is
launched and none has anything to compute, as on a GPU that is never behind. (That nothing of a
sample's true size is worked on by the host is tested on torch's meta device; as a clock it is of no
use, its shape functions are Python and take milliseconds.) CPU time of the thread, and of that
the lower quartile over steps: other work on the machine only adds to it.
- `step_ms`: the loop around a network of one operation and one parameter: launching a network's own
  operations is the same for every loop.
- `update_ms`: clipping, AdamW and the average of as many parameters as the real network has, of one
  element each. On a CPU that is four operations a parameter, on a GPU a few for all together, so it
  is an upper bound there.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from drorae.config import Compute
from drorae.models.decoder import Decoder
from drorae.models.decoder_config import decoder_preset
from drorae.models.dit import DiT
from drorae.models.dit_config import dit_preset
from drorae.models.fusion_output import FusionOutput
from drorae.recipes.smoke import smoke
from drorae.training.diffusion import train_diffusion
from drorae.training.ema import ema_init, ema_update, trained_parameters
from drorae.training.loop import LoopTools
from drorae.training.optim import build_optimizer, clip_gradients
from drorae.training.tokenizer import TokenizerPhase, train_tokenizer
from drorae.training.world import World

BATCH = 32  # ImageNet at 256 px, one GPU's part of a batch
LATENT, IMAGE, HIDDEN = (1, 1, 1), (3, 1, 1), (1, 1, 1)
WARM_UP = 2  # steps that are not counted
SIZES = {"tiny": ("DiT-S", "ViT-B", 4), "small": ("DiT-DH-XL", "ViT-XL", 40)}
SIZES["full"] = SIZES["small"]


class OneOperation(torch.autograd.Function):
    """Something of a given shape; the input and every parameter get a gradient."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], values: Tensor, *parameters: Tensor) -> Tensor:
        ctx.inputs = values, *parameters
        return values.new_empty(len(values), *shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, *(torch.empty_like(value) for value in ctx.inputs)


class StandIn(nn.Module):
    """A network of one operation and one parameter.

    Args:
        shape: Of one output.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.shape = shape

    def forward(self, values: Tensor, *conditions: Tensor) -> Tensor:
        return OneOperation.apply(self.shape, values, self.scale)  # pyright: ignore[reportReturnType]


def update_ms(network: nn.Module, num_steps: int) -> float:
    """Milliseconds of what follows the backward pass, with a tiny tensor for each parameter."""
    kept = nn.ParameterList(torch.ones(1) for p in network.parameters() if p.requires_grad)
    optim = replace(smoke().diffusion.optim, clip_norm=1.0)
    optimizer = build_optimizer(kept, optim)
    average, trained, seconds = ema_init(kept), trained_parameters(kept), []
    for _ in range(num_steps):
        for parameter in kept.parameters():
            parameter.grad = torch.ones(1)
        start = time.thread_time()
        clip_gradients(trained.values(), optim.clip_norm)
        optimizer.step()
        ema_update(average, trained, 0.999)
        seconds.append(time.thread_time() - start)
    return 1e3 * statistics.quantiles(seconds[WARM_UP:], n=4)[0]


@dataclass
class Clocked:
    """Batches of a loop that note the CPU time of its thread between two of them."""

    make: Callable[[int], Any]
    num_steps: int
    seconds: list[float] = field(default_factory=list)

    def __call__(self, first: int) -> Iterator[Any]:
        for step in range(first, self.num_steps):
            batch = self.make(step)
            start = time.thread_time()
            yield batch
            self.seconds.append(time.thread_time() - start)

    def milliseconds(self) -> float:
        return 1e3 * statistics.quantiles(self.seconds[WARM_UP:], n=4)[0]


def rows(device: torch.device, sizes: str, repeats: int) -> Iterator[dict]:
    """One row for each loop."""
    diffusion, decoder, num_steps = SIZES[sizes]
    yield _diffusion(diffusion, num_steps * repeats)
    yield _tokenizer(decoder, num_steps * repeats)


def _tools() -> LoopTools:
    return LoopTools(
        world=World(),
        compute=Compute(log_every_steps=10**6, save_every_steps=10**6),
        checkpoints=_Nowhere(),
        log=lambda row, step: None,
        progress=lambda done, total: None,
    )


class _Nowhere:
    def restore(self, tensors: Any) -> None:
        return None

    def due(self, step: int) -> bool:
        return False

    def overdue(self) -> bool:
        return False

    def save(self, step: int, tensors: Any, small: dict[str, Any]) -> None:
        raise AssertionError


def _diffusion(preset: str, num_steps: int) -> dict:
    shape = dit_preset(preset)
    job = replace(smoke().diffusion, model=shape, batch_images=BATCH, num_steps=num_steps + 1)
    latents, labels = torch.randn(BATCH, *LATENT).half(), torch.zeros(BATCH, dtype=torch.long)
    stats = {"mean": torch.zeros(LATENT), "var": torch.ones(LATENT)}
    network = StandIn(LATENT)
    with torch.device("meta"):
        real = DiT(shape)

    def make(step: int) -> Any:
        places = torch.arange(BATCH)
        return SimpleNamespace(
            step=step, positions=places, ids_digest=step, latents=latents, labels=labels
        )

    clocked = Clocked(make, num_steps)
    model: Any = network
    train_diffusion(job, model, clocked, _tools(), stats=stats, stage="diffusion", seed=0)
    return _row("diffusion", real, clocked)


def _tokenizer(preset: str, num_steps: int) -> dict:
    shape = decoder_preset(preset)
    train = replace(
        smoke().decoder.train,
        batch_images=BATCH,
        num_steps=num_steps + 1,
        eval_every_steps=10**6,
        lpips_weight=0.0,
        noise_tau=0.8,
    )
    images = torch.randint(256, (BATCH, *IMAGE), dtype=torch.uint8)
    hidden = torch.randn(BATCH, *HIDDEN).half()
    network = StandIn(IMAGE)
    with torch.device("meta"):
        real = Decoder(shape)
    phase = TokenizerPhase(
        name="decoder",
        trainable=network,
        encode=_last_layer,
        decode=network,
        last_layer_gradient=lambda features, gradient: gradient,
    )

    def make(step: int) -> Any:
        places = torch.arange(BATCH)
        return SimpleNamespace(
            step=step, positions=places, ids_digest=step, images=images, hidden=hidden
        )

    clocked = Clocked(make, num_steps)
    train_tokenizer(train, phase, clocked, None, _tools(), seed=0)
    return _row("tokenizer", real, clocked)


def _last_layer(hidden: Tensor) -> FusionOutput:
    return FusionOutput(latent=hidden[:, -1], base=hidden[:, -1], penalty=hidden.new_zeros(()))


def _row(name: str, network: nn.Module, clocked: Clocked) -> dict:
    step, update = clocked.milliseconds(), update_ms(network, clocked.num_steps)
    return {
        "loop": name,
        "batch": BATCH,
        "parameter_tensors": sum(p.requires_grad for p in network.parameters()),
        "step_ms": step,
        "update_ms": update,
        "host_ms": step + update,
    }
