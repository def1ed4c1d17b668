"""DiT-DH: a training step and 50-step sampling against the plain re-statement."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from bench_plain import Weights, plain_velocity, plain_weights, split_weights
from bench_timing import autocast, interleaved, peak_memory_mib, require_agreement
from torch import Tensor

from drorae.diffusion.guidance import conditional_velocity_fn
from drorae.diffusion.solvers import euler
from drorae.diffusion.times import time_grid
from drorae.models.dit import DiT, DiTConfig, dit_preset

STEPS = 50
Inputs = tuple[Tensor, Tensor, Tensor]
SMOKE = DiTConfig(
    input_size=8,
    in_channels=384,
    hidden_size=(192, 384),
    depth=(4, 1),
    num_heads=(3, 6),
    num_classes=10,
    mlp_ratio=2.0,
)
TINY = DiTConfig(
    input_size=4,
    in_channels=6,
    hidden_size=(16, 24),
    depth=(2, 1),
    num_heads=(2, 2),
    num_classes=5,
)
MIDDLE = dit_preset("DiT-DH-S", in_channels=768, input_size=16)
TOLERANCE = {"float32": 2e-4, "bfloat16": 1e-1}  # relative; bf16: two unlike roundings of 8 bits


def _sized(config: DiTConfig, input_size: int) -> DiTConfig:
    fields = {name: getattr(config, name) for name in DiTConfig.__dataclass_fields__}
    return DiTConfig(**(fields | {"input_size": input_size}))


# name, configuration, batch
TRAINING = {
    "tiny": [("tiny", TINY, 2)],
    "small": [
        *(("smoke", SMOKE, batch) for batch in (4, 16, 32)),
        *(("smoke", _sized(SMOKE, side), 8) for side in (4, 8, 16)),
        ("DiT-DH-S", MIDDLE, 1),
    ],
    "full": [
        *(("DiT-DH-S", MIDDLE, batch) for batch in (8, 32, 128)),
        ("DiT-DH-S", _sized(MIDDLE, 32), 16),
        ("DiT-DH-XL", dit_preset("DiT-DH-XL"), 16),
        ("smoke", SMOKE, 16),
    ],
}
SAMPLING = {
    "tiny": [("tiny", TINY, 2)],
    "small": [("smoke", SMOKE, 1), ("smoke", SMOKE, 4), ("smoke", _sized(SMOKE, 16), 1)],
    "full": [
        ("DiT-DH-S", MIDDLE, 1),
        ("DiT-DH-S", MIDDLE, 32),
        ("DiT-DH-XL", dit_preset("DiT-DH-XL"), 16),
    ],
}


def build(config: DiTConfig, batch: int, device: torch.device) -> tuple[DiT, Weights, Inputs]:
    torch.manual_seed(0)
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():  # a fresh model is zero
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    model = model.to(device).eval()
    side = config.input_size
    noisy = torch.randn(batch, config.in_channels, side, side).to(device)
    t = torch.linspace(0.1, 0.9, batch).to(device)
    labels = (torch.arange(batch) % config.num_classes).to(device)
    return model, plain_weights(model), (noisy, t, labels)


def train_step(predict: Callable[..., Tensor], inputs: Inputs, precision: str) -> Tensor:
    with autocast(inputs[0].device, precision):
        velocity = predict(*inputs)
    velocity.float().square().mean().backward()
    return velocity


def sample_plain(weights: Weights, model: DiT, inputs: Inputs, precision: str) -> Tensor:
    noisy, _, labels = inputs
    with torch.no_grad(), autocast(noisy.device, precision):
        for now, later in pairwise(time_grid(STEPS + 1, 1.0).tolist()):
            t = torch.full((len(noisy),), now, device=noisy.device)
            noisy = noisy + (later - now) * plain_velocity(weights, model, noisy, t, labels)
    return noisy


def sample_ours(model: DiT, inputs: Inputs, precision: str) -> Tensor:
    noisy, _, labels = inputs
    with autocast(noisy.device, precision):
        return euler(conditional_velocity_fn(model, labels), noisy, time_grid(STEPS + 1, 1.0))


def _clear(model: DiT, weights: Weights) -> None:
    model.zero_grad(set_to_none=True)
    for value in weights.values():
        value.grad = None


def check(model: DiT, weights: Weights, inputs: Inputs) -> float:
    """Velocity and all gradients agree in float32.

    Raises:
        RuntimeError: They do not.
    """
    velocity = train_step(model, inputs, "float32")
    other = train_step(lambda *x: plain_velocity(weights, model, *x), inputs, "float32")
    ours = split_weights({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain = {n: w.grad for n, w in weights.items() if w.grad is not None}
    _clear(model, weights)
    return require_agreement(
        ours | {"velocity": velocity}, plain | {"velocity": other}, TOLERANCE["float32"]
    )


def training_rows(device: torch.device, sizes: str, precision: str, repeats: int) -> Iterator[dict]:
    for name, config, batch in TRAINING[sizes]:
        model, weights, inputs = build(config, batch, device)
        error = check(model, weights, inputs)

        def ours(model=model, weights=weights, inputs=inputs) -> Tensor:
            _clear(model, weights)
            return train_step(model, inputs, precision)

        def plain(model=model, weights=weights, inputs=inputs) -> Tensor:
            _clear(model, weights)
            return train_step(lambda *x: plain_velocity(weights, model, *x), inputs, precision)

        yield _row(
            name, config, batch, precision, {"ours": ours, "plain": plain}, repeats, device
        ) | {"max_rel_err_float32": error}


def sampling_rows(device: torch.device, sizes: str, precision: str, repeats: int) -> Iterator[dict]:
    for name, config, batch in SAMPLING[sizes]:
        model, weights, inputs = build(config, batch, device)
        error = check(model, weights, inputs)

        def ours(model=model, inputs=inputs) -> Tensor:
            return sample_ours(model, inputs, precision)

        def plain(model=model, weights=weights, inputs=inputs) -> Tensor:
            return sample_plain(weights, model, inputs, precision)

        require_agreement({"sample": ours()}, {"sample": plain()}, TOLERANCE[precision])
        yield _row(
            name, config, batch, precision, {"ours": ours, "plain": plain}, repeats, device
        ) | {"max_rel_err_float32": error}


def _row(
    name: str,
    config: DiTConfig,
    batch: int,
    precision: str,
    runs: dict[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
) -> dict:
    seconds = interleaved(runs, repeats, device)
    memory = {key: peak_memory_mib(run, device) for key, run in runs.items()}
    return {
        "model": name,
        "batch": batch,
        "tokens": config.input_size**2,
        "precision": precision,
        "plain_ms": 1e3 * seconds["plain"],
        "ours_ms": 1e3 * seconds["ours"],
        "speedup": seconds["plain"] / seconds["ours"],
        "plain_peak_mib": memory["plain"],
        "ours_peak_mib": memory["ours"],
    }
