"""LPIPS v0.1 from one weight file, without the `lpips` package and without downloads.

Same numbers as `lpips.LPIPS(net="alex" | "vgg")`: shifted and scaled input, a truncated AlexNet or
VGG16, each tap divided by its channel norm, squared difference, non-negative 1x1 heads, spatial
mean, sum over taps (arXiv:1801.03924). The weight file is
safetensors: `trunk.{i}.weight` and `.bias` in order of the convolutions, `lin.{k}.weight` [1, C, 1,
    1] per tap. RAE trains with
VGG.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from drorae.shapes import Float, Tensor

__all__ = ["PerceptualLoss", "load_perceptual"]

# LPIPS's scaling layer: ImageNet statistics for input in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
NORM_EPS = 1e-10  # lpips.normalize_tensor
ROOT_FLOOR = 1e-20  # keeps the gradient finite where all channels are 0; lpips gives NaN there


@dataclass(frozen=True, kw_only=True, slots=True)
class _Conv:
    """One convolution of a trunk; a ReLU always follows."""

    stride: int = 1
    padding: int = 1
    pool: int = 0
    """Window of the max pooling before it, stride 2; 0: none."""
    tap: bool = False
    """Whether the output behind the ReLU is compared."""


def _vgg16() -> tuple[_Conv, ...]:
    blocks = (2, 2, 3, 3, 3)
    return tuple(
        _Conv(pool=2 if block and not i else 0, tap=i == size - 1)
        for block, size in enumerate(blocks)
        for i in range(size)
    )


TRUNKS = {
    "alex": (
        _Conv(stride=4, padding=2, tap=True),
        _Conv(padding=2, pool=3, tap=True),
        _Conv(pool=3, tap=True),
        _Conv(tap=True),
        _Conv(tap=True),
    ),
    "vgg": _vgg16(),
}


class PerceptualLoss(nn.Module):
    """LPIPS distance of image pairs. Frozen; its weights are in no state dict.

    Args:
        weights: Tensors under the names in the module's docstring; 5 convolutions are AlexNet, 13
            VGG16.
        evaluate_px: Compare images resized to this side; 0: as they are. 181 instead of 256 halves
            the cost of the trunk; such values compare only with one another.

    Raises:
        ValueError: If the tensors form neither network.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: Mapping[str, Tensor], evaluate_px: int = 0) -> None:
        super().__init__()
        num_convs = sum(key.startswith("trunk.") and key.endswith(".weight") for key in weights)
        by_size = {len(convs): name for name, convs in TRUNKS.items()}
        if num_convs not in by_size:
            raise ValueError(
                f"The LPIPS weights have {num_convs} convolutions: expected 5 (alex) or 13 (vgg)."
            )
        self.net = by_size[num_convs]
        self.evaluate_px = evaluate_px
        self.convs = TRUNKS[self.net]
        num_taps = sum(conv.tap for conv in self.convs)
        names = [f"trunk.{i}.{kind}" for i in range(num_convs) for kind in ("weight", "bias")]
        names += [f"lin.{k}.weight" for k in range(num_taps)]
        if sorted(names) != sorted(weights):
            difference = sorted(set(names) ^ set(weights))
            raise ValueError(
                f"The LPIPS weights do not fit {self.net}: {difference[:4]}; refetch them."
            )
        for name in names:
            tensor = weights[name].detach().float().clone()
            self.register_buffer(name.replace(".", "_"), tensor, persistent=False)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        targets: Float[Tensor, "batch 3 height width"],
    ) -> Float[Tensor, " batch"]:
        """Distance of each pair.

        Args:
            images: In [0, 1] units, not necessarily clamped; LPIPS's [-1, 1] is made here.
            targets: Originals; no gradient is kept for their half of the trunk unless they need
                one.
        """
        found = self.features(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and targets.requires_grad):
            wanted = self.features(targets)
        total = images.new_zeros(len(images))
        for tap, (a, b) in enumerate(zip(found, wanted, strict=True)):
            head = self.get_buffer(f"lin_{tap}_weight")
            total = total + F.conv2d((a - b).square(), head).mean(dim=(1, 2, 3))
        return total

    def features(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> list[Float[Tensor, "batch channels h w"]]:
        """Unit-norm channel vectors at every tap."""
        if self.evaluate_px and images.shape[-1] != self.evaluate_px:
            size = (self.evaluate_px, self.evaluate_px)
            images = F.interpolate(
                images, size, mode="bilinear", align_corners=False, antialias=True
            )
        x = (2 * images - 1 - self.shift) / self.scale
        taps = []
        for index, conv in enumerate(self.convs):
            if conv.pool:
                x = F.max_pool2d(x, conv.pool, stride=2)
            weight, bias = (self.get_buffer(f"trunk_{index}_{kind}") for kind in ("weight", "bias"))
            x = F.relu(F.conv2d(x, weight, bias, stride=conv.stride, padding=conv.padding))
            if conv.tap:
                norm = torch.sqrt(x.square().sum(dim=1, keepdim=True) + ROOT_FLOOR)
                taps.append(x / (norm + NORM_EPS))
        return taps


def load_perceptual(path: str | Path, evaluate_px: int = 0) -> PerceptualLoss:
    """Read LPIPS from its weight file.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it is no LPIPS weight file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} is no file: expected LPIPS weights; fetch the assets first."
        )
    return PerceptualLoss(load_file(path), evaluate_px)
