"""PSNR, SSIM and LPIPS, one value per image, on 8-bit images as the RAE protocol measures them.

Reconstructions are turned into uint8 by truncation (no rounding), which lowers every value by half
a step on average; this is part of the published protocol and is repeated here so that numbers can
agree. SSIM is torchmetrics' default definition (Gaussian 11 x 11, sigma 1.5, k = .01/.03, reflected
borders), written out because one convolution does not earn a dependency at run time; a test holds
it to torchmetrics.

Source: RAE evaluation code as restated in the project's reference, section 5.
"""

from collections.abc import Callable

import torch
from torch.nn import functional

from drorae.shapes import Float, Tensor, UInt8

__all__ = ["lpips_per_image", "psnr_per_image", "ssim_per_image", "to_uint8", "to_unit"]

MSE_FLOOR = 1e-10  # RAE: identical images score 100 dB instead of infinity.
SSIM_WINDOW_PX = 11
SSIM_SIGMA_PX = 1.5
SSIM_K1 = 0.01
SSIM_K2 = 0.03


def to_uint8(
    images: Float[Tensor, "batch 3 height width"],
) -> UInt8[Tensor, "batch 3 height width"]:
    """Clamp to [0, 1], scale to 255 and truncate, as RAE stores images."""
    return (images.clamp(0.0, 1.0) * 255.0).to(torch.uint8)


def to_unit(images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """Bytes to float32 in [0, 1]."""
    return images.float() / 255.0


def psnr_per_image(
    original: UInt8[Tensor, "batch 3 height width"], other: UInt8[Tensor, "batch 3 height width"]
) -> Float[Tensor, " batch"]:
    """Peak signal-to-noise ratio over all three channels, dB, peak 1; at most 100 dB."""
    _check_pair(original, other)
    error = (to_unit(original) - to_unit(other)).square().mean(dim=(1, 2, 3))
    return -10.0 * torch.log10(error.clamp_min(MSE_FLOOR))


def ssim_per_image(
    original: UInt8[Tensor, "batch 3 height width"], other: UInt8[Tensor, "batch 3 height width"]
) -> Float[Tensor, " batch"]:
    """Structural similarity, mean over channels and positions, data range 1.

    Borders are reflected and count, as in torchmetrics since its pull request 2721 (September
    2024); older releases left out a band of 5 pixels.

    Raises:
        ValueError: If the images are smaller than the window.
    """
    _check_pair(original, other)
    if min(original.shape[-2:]) < SSIM_WINDOW_PX:
        raise ValueError(
            f"SSIM got images of {tuple(original.shape[-2:])} px: expected at least "
            f"{SSIM_WINDOW_PX} px a side; "
            "use larger images."
        )
    first, second = to_unit(original), to_unit(other)
    stack = torch.cat([first, second, first * first, second * second, first * second])
    mean_1, mean_2, square_1, square_2, product = _gaussian_blur(stack).chunk(5)
    var_1 = (square_1 - mean_1.square()).clamp_min(0.0)
    var_2 = (square_2 - mean_2.square()).clamp_min(0.0)
    covariance = product - mean_1 * mean_2
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    upper = (2.0 * mean_1 * mean_2 + c1) * (2.0 * covariance + c2)
    lower = (mean_1.square() + mean_2.square() + c1) * (var_1 + var_2 + c2)
    return (upper / lower).mean(dim=(1, 2, 3))


def lpips_per_image(
    original: UInt8[Tensor, "batch 3 height width"],
    other: UInt8[Tensor, "batch 3 height width"],
    distance: Callable[[Tensor, Tensor], Tensor],
) -> Float[Tensor, " batch"]:
    """LPIPS of each pair.

    Args:
        original: Photos.
        other: Reconstructions.
        distance: `drorae.losses.perceptual` network: takes images in [0, 1], returns one value per
            image.
    """
    _check_pair(original, other)
    with torch.no_grad():
        return distance(to_unit(original), to_unit(other)).reshape(-1).float()


def _check_pair(original: Tensor, other: Tensor) -> None:
    if original.shape != other.shape:
        raise ValueError(
            f"image metric got shapes {tuple(original.shape)} and {tuple(other.shape)}: expected "
            "equal shapes; "
            "pair each reconstruction with its own photo."
        )


def _gaussian_blur(images: Tensor) -> Tensor:
    """Separable Gaussian at every position, borders reflected."""
    offsets = torch.arange(SSIM_WINDOW_PX, dtype=images.dtype, device=images.device)
    offsets = offsets - (SSIM_WINDOW_PX - 1) / 2
    window = torch.exp(-0.5 * (offsets / SSIM_SIGMA_PX).square())
    window = window / window.sum()
    channels = images.shape[1]
    column = window.reshape(1, 1, -1, 1).repeat(channels, 1, 1, 1)
    row = window.reshape(1, 1, 1, -1).repeat(channels, 1, 1, 1)
    reach = SSIM_WINDOW_PX // 2
    padded = functional.pad(images, (reach, reach, reach, reach), mode="reflect")
    return functional.conv2d(
        functional.conv2d(padded, column, groups=channels), row, groups=channels
    )
