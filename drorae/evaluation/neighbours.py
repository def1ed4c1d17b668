"""Precision and recall of feature sets: membership in balls of nearest-neighbour radius.

The definition is torch-fidelity's (Kynkaanniemi et al. 2019), whose code holds a matrix of all
distances: 16.4 bytes a pair, 41 GB at 50,000 images. Here distances are computed in blocks, on the
device, and forgotten. Memory grows with the images (two sets of features), time with their square.
"""

from collections.abc import Iterator

import numpy as np
import torch

from drorae.shapes import Bool, Float, Tensor

__all__ = ["neighbour_radii", "precision_and_recall"]

ROWS, COLUMNS = 1024, 8192  # a block of float32 distances is 32 MB


def neighbour_radii(
    features: Float[np.ndarray, "images dim"],
    neighbours: int,
    device: torch.device | str = "cpu",
) -> Float[np.ndarray, " images"]:
    """Distance of every image to its nearest other ones, in feature space.

    Args:
        features: One row an image.
        neighbours: Which of the nearest counts; 1 is the nearest.
        device: Where distances are computed.

    Raises:
        ValueError: If there are not more images than neighbours.
    """
    if not 1 <= neighbours < len(features):
        raise ValueError(
            f"neighbours={neighbours} does not fit {len(features)} images: expected 1 or more, and "
            "more images than neighbours."
        )
    rows = torch.from_numpy(features).to(device)
    radii = []
    for block in rows.split(ROWS):
        nearest = block.new_full((len(block), 0), 0.0)
        for columns in rows.split(COLUMNS):
            found = torch.cat([nearest, torch.cdist(block, columns)], dim=1)
            # The nearest of all is the image itself.
            size = min(neighbours + 1, found.shape[1])
            nearest = found.topk(size, dim=1, largest=False, sorted=True).values
        radii.append(nearest[:, neighbours].cpu())
    return torch.cat(radii).numpy()


def precision_and_recall(
    samples: Float[np.ndarray, "samples dim"],
    sample_radii: Float[np.ndarray, " samples"],
    reference: Float[np.ndarray, "photos dim"],
    reference_radii: Float[np.ndarray, " photos"],
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Share of samples in a ball of a photo, and share of photos in a ball of a sample.

    Args:
        samples: Features of generated images.
        sample_radii: Their `neighbour_radii`: the size of their balls.
        reference: Features of the reference photos.
        reference_radii: The radii of these.
        device: Where distances are computed.
    """
    inside_photo, inside_sample = [], torch.zeros(len(reference), dtype=torch.bool, device=device)
    photos = torch.from_numpy(reference).to(device)
    photo_radii = torch.from_numpy(reference_radii).to(device)
    drawn = torch.from_numpy(samples).to(device)
    drawn_radii = torch.from_numpy(sample_radii).to(device)
    for block, radii in zip(drawn.split(ROWS), drawn_radii.split(ROWS), strict=True):
        inside = torch.zeros(len(block), dtype=torch.bool, device=device)
        for part, distances in _blocks(block, photos):
            inside |= (distances <= photo_radii[part]).any(dim=1)
            inside_sample[part] |= (distances <= radii[:, None]).any(dim=0)
        inside_photo.append(inside)
    return _share(torch.cat(inside_photo)), _share(inside_sample)


def _blocks(block: Tensor, others: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(others), COLUMNS):
        part = slice(start, min(start + COLUMNS, len(others)))
        yield part, torch.cdist(block, others[part])


def _share(inside: Bool[Tensor, " images"]) -> float:
    return float(inside.double().mean())
