"""Pixel reconstruction loss."""

from drorae.shapes import Float, Tensor

__all__ = ["l1_per_image"]


def l1_per_image(
    images: Float[Tensor, "batch 3 height width"], targets: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, " batch"]:
    """Mean absolute difference of each image, in [0, 1] units, without clamping, as in RAE.

    Args:
        images: Decoder output.
        targets: Originals in [0, 1].
    """
    return (images - targets).abs().flatten(1).mean(dim=1)
