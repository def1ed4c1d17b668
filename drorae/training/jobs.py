"""All configuration of the training stages: networks, schedules, optimisers. Imports no torch.

In one file, because a recipe names most of it at once and planning a run must not load torch; the
functions that each class configures are in the module of its name (`optim`, `critic`, `tokenizer`,
`diffusion`), and `drorae.training.stages` takes the `...Stage` classes.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from drorae.config import expand_home
from drorae.data.jobs import OrderConfig
from drorae.diffusion.time_config import TimeConfig
from drorae.models.decoder_config import DecoderConfig
from drorae.models.discriminator_config import DiscriminatorConfig
from drorae.models.dit_config import DiTConfig
from drorae.models.fusion_config import FusionConfig
from drorae.store.content import content_id

__all__ = [
    "AdversarialConfig",
    "DecoderStage",
    "DiffusionStage",
    "FinetuneStage",
    "FusionStage",
    "OptimConfig",
    "TokenizerTraining",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 1e-4
    """Peak learning rate. DRoRAE, section 2.2: 1e-4 in every phase."""
    betas: tuple[float, float] = (0.5, 0.9)
    """AdamW betas. DRoRAE tokenizer phases (.5,.9), DiT (.9,.999); RAE (.9,.95) in both."""
    weight_decay: float = 0.05
    """Decoupled weight decay. DRoRAE tokenizer phases 0.05, DiT 0; RAE 0."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Shape after the warm-up: constant, or from `lr` down to `final_lr`."""
    warmup_steps: int = 0
    """Linear rise from 0, factor (step + 1) / warmup_steps. RAE decoder: one epoch."""
    hold_steps: int = 0
    """Steps at `lr` before the decay starts. RAE DiT: 40 epochs."""
    final_lr: float = 0.0
    """Learning rate at the end of the schedule. RAE: 2e-5."""
    schedule_steps: int = 0
    """Steps after which `final_lr` is reached; 0: the end of training. RAE DiT: 800 epochs, of
    which any number is trained."""
    clip_norm: float = 0.0
    """Largest global gradient norm; 0 switches clipping off. RAE: off for the decoder, 1.0 for the
    DiT."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.lr <= 0:
            raise ValueError(f"optim.lr={self.lr} is out of range: expected a positive number.")
        if min(self.warmup_steps, self.hold_steps, self.schedule_steps, self.clip_norm) < 0:
            raise ValueError(
                "optim.warmup_steps, hold_steps, schedule_steps and clip_norm must be 0 or more."
            )
        for name in ("weight_decay", "final_lr"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"optim.{name}={value} is out of range: expected 0 or more.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas={self.betas} is out of range: expected [0, 1).")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdversarialConfig:
    """Adversarial term of Eq. 6."""

    weight: float = 0.0
    """lambda_g; 0 leaves the discriminator out. RAE: 0.75 (the paper says only "adaptive")."""
    start_step: int = 0
    """First step whose generator loss holds the term. DRoRAE: 30,000 (decoder), 10,000 (fusion)."""
    start_epoch: float | None = None
    """The same in epochs, instead of `start_step`. RAE: 8."""
    learn_from_step: int = 0
    """First step in which the discriminator learns."""
    learn_from_epoch: float | None = None
    """The same in epochs, instead of `learn_from_step`. RAE: 6."""
    discriminator: DiscriminatorConfig = field(
        default_factory=lambda: DiscriminatorConfig(source="dino_vit_small_patch8_224.pth")
    )
    """The discriminator; its trunk is a file in DINO's own key names."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0)
    )
    """Discriminator optimiser. RAE: 2e-4, (0.9, 0.95), no decay."""
    schedule_span: Literal["learning", "phase"] = "learning"
    """Length of its schedule, which counts the discriminator's own steps: those in which it learns,
    or the whole phase, as in RAE, whose rate therefore ends above `final_lr`."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.weight < 0:
            raise ValueError(f"adversarial.weight={self.weight} is negative: expected 0 or more.")
        for name in ("start", "learn_from"):
            step, epoch = getattr(self, f"{name}_step"), getattr(self, f"{name}_epoch")
            if min(step, epoch or 0) < 0:
                raise ValueError(
                    f"adversarial.{name}_step={step}, {name}_epoch={epoch}: expected 0 or more."
                )
            if step and epoch is not None:
                raise ValueError(
                    f"adversarial.{name}_step={step} and {name}_epoch={epoch} are both given: "
                    "expected one unit; leave the other at its default."
                )
        if self.start_epoch is None and self.learn_from_epoch is None:
            _check_order("step", self.learn_from_step, self.start_step)
        elif self.start_epoch is not None and self.learn_from_epoch is not None:
            _check_order("epoch", self.learn_from_epoch, self.start_epoch)

    def in_steps(self, steps_per_epoch: int) -> "AdversarialConfig":
        """The same with both starts in steps.

        Raises:
            ValueError: If the discriminator would learn only after the generator follows it.
        """
        return replace(
            self,
            start_step=_steps(self.start_step, self.start_epoch, steps_per_epoch),
            learn_from_step=_steps(self.learn_from_step, self.learn_from_epoch, steps_per_epoch),
            start_epoch=None,
            learn_from_epoch=None,
        )


def _steps(step: int, epoch: float | None, steps_per_epoch: int) -> int:
    return step if epoch is None else round(epoch * steps_per_epoch)


def _check_order(unit: str, learn_from: float, start: float) -> None:
    if learn_from > start:
        raise ValueError(
            f"adversarial.learn_from_{unit}={learn_from} lies after start_{unit}={start}: the "
            "generator would follow an untrained discriminator."
        )


def _check_streams(batch_images: int, order: OrderConfig) -> None:
    if batch_images % order.streams:
        fitting = math.gcd(batch_images, order.streams)
        raise ValueError(
            f"order.streams={order.streams} does not divide batch_images={batch_images}: expected "
            f"a divisor of it; set order.streams={fitting} or another batch."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerTraining:
    """What one tokenizer phase computes."""

    num_steps: int
    """Optimiser steps. DRoRAE: 100, 100 and 20 ImageNet epochs of 5,004 steps at batch 256."""
    batch_images: int = 256
    """Images in a global batch, over all workers. DRoRAE section 2.2: 256."""
    order: OrderConfig = field(default_factory=OrderConfig)
    """Order of the samples of an epoch; its streams must divide `batch_images`."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser of the generator side."""
    l1_weight: float = 1.0
    """Weight of mean |reconstruction - image| in [0,1] units. Eq. 6."""
    lpips_weight: float = 1.0
    """Weight of LPIPS; 0 leaves it out. Eq. 6, lambda_p = 1."""
    lpips_net: Literal["vgg", "alex"] = "vgg"
    """Trunk of the LPIPS loss. RAE: vgg."""
    noise_tau: float = 0.8
    """Latent noise: sigma = tau * U(0,1) per image. RAE code (`n08`); 0 switches it off."""
    noise_kind: Literal["uniform", "half_normal"] = "uniform"
    """How sigma is drawn: tau * U(0,1) as RAE's code, or |N(0, tau^2)| as its text."""
    ema_decay: float = 0.9978
    """Decay of the weight average per step. RAE decoder."""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    """Discriminator and its weight; off by default."""
    view: Literal["fixed", "random_crop"] = "fixed"
    """Training images: the stored squares, or a new random crop in each epoch (needs
    `shard.view_px`). RAE: random crops, no flip."""
    hidden_states: Literal["none", "memory", "disk"] = "none"
    """Whether the frozen encoder's hidden states are kept between steps; needs a fixed view of each
    image."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Autocast of the forward pass; weights, losses and EMA stay float32. With bfloat16 the matrix
    products that autocast leaves out (encoder, discriminator) use TF32 on a GPU, as RAE's encoder
    does."""
    eval_every_steps: int = 200
    """Steps between two evaluations of the EMA on a few held-out images."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.num_steps < 1 or self.batch_images < 1:
            raise ValueError(
                f"num_steps={self.num_steps}, batch_images={self.batch_images}: expected 1 or more."
            )
        _check_streams(self.batch_images, self.order)
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay={self.ema_decay} is out of range: expected [0, 1).")
        for name in ("noise_tau", "l1_weight", "lpips_weight"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name}={getattr(self, name)} is out of range: expected 0 or more."
                )
        if self.eval_every_steps < 1:
            raise ValueError(
                f"eval_every_steps={self.eval_every_steps} is out of range: expected 1 or more."
            )
        if self.view == "random_crop" and self.hidden_states != "none":
            raise ValueError(
                f"hidden_states={self.hidden_states} cannot keep states of view=random_crop, which "
                "differ in every epoch: expected hidden_states=none, or view=fixed."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderStage:
    """The `decoder` stage: train RAE's decoder, or import a released one."""

    model: DecoderConfig
    """Size of the decoder; an imported one must fit it."""
    train: TokenizerTraining
    """How it is trained; unused when `released` is given."""
    released: str = ""
    """Path, s3:// address or `sha256:HEX` of released decoder weights (any of the five layouts);
    empty trains from scratch. `sha256:HEX` names what `drorae import` has put into the
    workspace."""
    released_stats: str = ""
    """Likewise the latent statistics released with it, which `latents.stats=imported` uses."""

    def __post_init__(self) -> None:
        """Check that statistics come with a decoder."""
        expand_home(self, "released", "released_stats")
        if self.released_stats and not self.released:
            raise ValueError(
                f"decoder.released_stats={self.released_stats} without decoder.released: expected "
                "the decoder that they were released with; set decoder.released too."
            )

    def for_key(self) -> object:
        """What a key covers: of an import, the files' content and the sizes, but no training.

        So a moved or renamed file, or another training section, gives the same key.

        Raises:
            FileNotFoundError: If a file is not there.
        """
        if not self.released:
            return self
        return {
            "model": self.model,
            "released": content_id(self.released),
            "released_stats": content_id(self.released_stats),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionStage:
    """The `fusion` stage: train the fusion module only."""

    model: FusionConfig
    """The fusion module."""
    train: TokenizerTraining
    """How it is trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneStage:
    """The `finetune` and `control` stages: train on the decoder of the `decoder` stage."""

    train: TokenizerTraining
    """How it is trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionStage:
    """What the `diffusion` and `guide` stages compute."""

    model: DiTConfig
    """The network."""
    num_steps: int
    """Optimiser steps. DRoRAE: 80 epochs at batch 256 = 400k; RAE: 80 epochs at batch 1024 =
    100k."""
    batch_images: int = 256
    """Images in a global batch, over all workers. DRoRAE 256, RAE 1024."""
    order: OrderConfig = field(default_factory=OrderConfig)
    """Order of the samples of an epoch; its streams must divide `batch_images`."""
    times: TimeConfig = field(default_factory=TimeConfig)
    """Distribution of t and its shift."""
    prediction: Literal["velocity", "clean"] = "velocity"
    """What the network gives: the velocity, or the clean latents, turned into it by (noisy - clean)
    / max(t, .05). RAE: velocity; RAEv2: clean."""
    base_weight: float = 1.0
    """Weight of the base head's loss beside the full one; only with model.base_head_after. RAEv2:
    1.0."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, schedule="constant", clip_norm=1.0
        )
    )
    """Optimiser. DRoRAE section 2.2: constant 1e-4, (.9,.999), no decay; clipping from RAE."""
    ema_decay: float = 0.9995
    """Decay of the weight average per step. RAE."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Number format of matrix products: float32, float32 with a GPU's TF32 units, or autocast to
    bfloat16. RAE: tf32; its authors advise against bfloat16 here."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.num_steps < 1 or self.batch_images < 1:
            raise ValueError(
                f"num_steps={self.num_steps}, batch_images={self.batch_images}: expected 1 or more."
            )
        _check_streams(self.batch_images, self.order)
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay={self.ema_decay} is out of range: expected [0, 1).")
        if self.base_weight < 0:
            raise ValueError(f"base_weight={self.base_weight} is negative: expected 0 or more.")
