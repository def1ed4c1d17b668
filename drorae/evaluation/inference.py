"""Trained models in use: encode, decode, reconstruct files, draw samples of a class.

This is what the `drorae reconstruct` and `drorae sample` commands call, and what the evaluate stage
is built on; `loading` makes the models from finished stages. Nothing here knows a recipe.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from drorae.data.decoding import BadImage, ImageLimits, decode_image, to_square
from drorae.diffusion.guidance import GuidanceConfig, guided_velocity_fn
from drorae.diffusion.noise import noise
from drorae.diffusion.predictions import Prediction, as_velocity_model
from drorae.diffusion.solvers import StepNoise, VelocityFn, euler, euler_maruyama, heun
from drorae.diffusion.times import TimeConfig, resolve_shift, time_grid
from drorae.evaluation.grids import image_grid, to_hwc
from drorae.evaluation.image_metrics import to_uint8, to_unit
from drorae.models.autoencoder import denormalise_latent
from drorae.models.decoder import Decoder
from drorae.models.dit import DiT
from drorae.models.encoder import Encoder
from drorae.models.fusion import FusionConfig, FusionOutput
from drorae.models.layers import map_to_tokens
from drorae.models.matmul import NumberFormat, number_format
from drorae.shapes import Float, Int, Tensor, UInt8

__all__ = [
    "Generator",
    "SamplerSettings",
    "Tokenizer",
    "reconstruct_files",
    "sample_images",
]

FILE_LIMITS = ImageLimits(min_side_px=8, max_aspect_ratio=50.0, max_pixels=200_000_000)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerSettings:
    """How one set of latents is drawn."""

    guidance: GuidanceConfig
    """Kind, scale and interval of guidance."""
    sampler: Literal["euler", "heun", "sde"] = "euler"
    """Solver."""
    churn: float = 1.0
    """How much noise `sde` replaces on the way."""
    num_grid_points: int = 50
    """Points of the time grid."""
    grid_end: Literal["reference", "zero"] = "reference"
    """Where the grid ends, see `time_grid`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """Frozen encoder, trained fusion and every decoder trained for them; all in eval mode."""

    encoder: Encoder
    fusion: nn.Module
    fusion_config: FusionConfig
    decoders: dict[str, Decoder]
    """By stage name."""
    device: torch.device
    precision: NumberFormat = "float32"
    """Of encoder, fusion and decoders."""

    @property
    def image_px(self) -> int:
        """Side of decoded images, pixels."""
        return next(iter(self.decoders.values())).config.image_px

    @torch.no_grad()
    def encode(self, images: UInt8[Tensor, "batch 3 height width"]) -> FusionOutput:
        """Latents of images; `base` of the result is RAE's latent."""
        with number_format(self.precision, self.device.type):
            return self.fusion(self.encoder(to_unit(images.to(self.device))))

    @torch.no_grad()
    def decode(
        self, tokens: Float[Tensor, "batch tokens dim"], stage: str
    ) -> UInt8[Tensor, "batch 3 height width"]:
        """Images from latents by the decoder of a stage; they stay on the device.

        Raises:
            ValueError: If that decoder was not loaded.
        """
        if stage not in self.decoders:
            raise ValueError(
                f"decoder of stage {stage!r} is not loaded: expected one of "
                f"{sorted(self.decoders)}; run that stage first."
            )
        with number_format(self.precision, self.device.type):
            return to_uint8(self.decoders[stage](tokens.to(self.device)).float())


@dataclass(frozen=True, kw_only=True, slots=True)
class Generator:
    """The diffusion model with its guide and the latent statistics; all in eval mode."""

    model: DiT
    guide: DiT | None
    mean: Float[Tensor, "channels height width"]
    var: Float[Tensor, "channels height width"]
    times: TimeConfig
    device: torch.device
    prediction: Prediction = "velocity"
    """What the network's output means."""
    guide_prediction: Prediction = "velocity"
    """What the guide's output means."""
    precision: NumberFormat = "float32"
    """Of model and guide; the solver's own sums are float32."""

    @property
    def num_classes(self) -> int:
        """Classes that can be asked for."""
        return self.model.config.num_classes

    def untrained(self, seed: int) -> "Generator":
        """The same network freshly initialised: the floor of every generation metric."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = DiT(self.model.config).to(self.device).eval()
        return replace(self, model=model, guide=None)

    @torch.no_grad()
    def sample(
        self,
        labels: Int[Tensor, " batch"],
        indices: Sequence[int],
        settings: SamplerSettings,
        seed: int,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Draw latents, not normalised, ready for a decoder.

        Args:
            labels: Class of each sample.
            indices: Global index of each sample: with `seed` it decides the noise, whatever the
                batch.
            settings: Solver and guidance.
            seed: Seed of the run.

        Raises:
            ValueError: If a label is out of range.
        """
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(
                f"labels {int(labels.min())}..{int(labels.max())} are out of range: expected 0 to "
                f"{self.num_classes - 1}."
            )
        shape = tuple(self.mean.shape)
        start = noise(seed, "sample", indices, shape, self.device)
        velocity = self._velocity(labels.to(self.device), settings.guidance)
        shift = resolve_shift(self.times, self.mean.numel())
        grid = time_grid(settings.num_grid_points, shift, settings.grid_end)

        def step_noise(step: int) -> Tensor:
            return noise(seed, f"sample/{step}", indices, shape, self.device)

        with number_format(self.precision, self.device.type):
            clean = _solve(velocity, start, grid, settings, step_noise)
        return map_to_tokens(denormalise_latent(clean, self.mean, self.var))

    def _velocity(self, labels: Int[Tensor, " batch"], guidance: GuidanceConfig) -> VelocityFn:
        weak = None
        if self.guide is not None:
            weak = as_velocity_model(self.guide, self.guide_prediction)
        return guided_velocity_fn(
            guidance,
            as_velocity_model(self.model, self.prediction),
            labels,
            null_label=self.model.null_label if guidance.kind == "cfg" else None,
            weak_model=weak,
        )


def _solve(
    velocity: VelocityFn,
    noise: Tensor,
    grid: Tensor,
    settings: SamplerSettings,
    fresh: StepNoise,
) -> Tensor:
    if settings.sampler == "sde":
        return euler_maruyama(velocity, noise, grid, step_noise=fresh, churn=settings.churn)
    solve = heun if settings.sampler == "heun" else euler
    return solve(velocity, noise, grid)


def reconstruct_files(tokenizer: Tokenizer, paths: Sequence[str | Path]) -> np.ndarray:
    """Show image files beside their RAE and fused reconstructions, one row a file.

    Args:
        tokenizer: Loaded models.
        paths: Image files in any format that Pillow reads; centre-cropped to a square.

    Returns:
        One labelled uint8 picture [height, width, 3].

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a file is no usable image.
    """
    images = torch.stack([_read_square(Path(path), tokenizer.image_px) for path in paths])
    latents = tokenizer.encode(images)
    columns = {"input": images}
    if "decoder" in tokenizer.decoders:
        columns["RAE"] = tokenizer.decode(latents.base, "decoder")
        columns["fusion"] = tokenizer.decode(latents.latent, "decoder")
    if "finetune" in tokenizer.decoders:
        columns["fine-tuned"] = tokenizer.decode(latents.latent, "finetune")
    tiles = [to_hwc(images.cpu().numpy()) for images in columns.values()]
    rows = [np.stack([column[i] for column in tiles]) for i in range(len(paths))]
    names = [Path(path).name for path in paths]
    return image_grid(rows, row_labels=names, column_labels=list(columns))


def sample_images(
    tokenizer: Tokenizer,
    generator: Generator,
    label: int,
    *,
    num_images: int,
    settings: SamplerSettings,
    seed: int = 0,
    decoder_stage: str = "finetune",
) -> UInt8[Tensor, "batch 3 height width"]:
    """Draw images of one class; image i depends on (seed, label, i) alone."""
    labels = torch.full((num_images,), label, dtype=torch.int64)
    indices = [label + generator.num_classes * i for i in range(num_images)]
    latents = generator.sample(labels, indices, settings, seed)
    return tokenizer.decode(latents, decoder_stage).cpu()


def _read_square(path: Path, side_px: int) -> UInt8[Tensor, "3 height width"]:
    if not path.is_file():
        raise FileNotFoundError(f"image {path} does not exist: expected an image file.")
    try:
        image = decode_image(path.read_bytes(), FILE_LIMITS)
    except BadImage as error:
        raise ValueError(f"image {path} cannot be used ({error}): give another file.") from error
    return torch.from_numpy(np.array(to_square(image, side_px, "center"))).permute(2, 0, 1)
