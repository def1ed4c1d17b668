"""What a tokenizer loop shows of itself: PSNR on a few held-out images, and a grid of them.

The loop calls the same function with the EMA in place and with the online weights, on every rank.
Each rank reads and reconstructs its part of the images, so an evaluation takes the time of the
largest part and every rank is busy for it; the sums are added up over ranks.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from drorae.data.batches import to_unit
from drorae.shapes import Float, Tensor
from drorae.tracking import Tracker
from drorae.training.tokenizer import TokenizerPhase
from drorae.training.world import World, mean_over_ranks

if TYPE_CHECKING:  # it reads shards, for which a GPU host may lack the packages
    from drorae.data.hidden_states import HiddenStates

__all__ = ["Evaluator", "psnr_db", "reconstruction_evaluator"]

NUM_SHOWN = 8  # images in the logged grid
Evaluator = Callable[[Tracker, int, str], dict[str, float]]


def psnr_db(
    images: Float[Tensor, "batch 3 height width"], recon: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, " batch"]:
    """Peak signal-to-noise ratio of each image in dB; images in [0, 1], float64."""
    error = (images.double() - recon.double().clamp(0, 1)).square().flatten(1).mean(1)
    return -10.0 * error.clamp_min(1e-10).log10()


def reconstruction_evaluator(
    phase: TokenizerPhase, held_out: "HiddenStates", world: World, num_images: int = 64
) -> Evaluator:
    """Build an evaluator of the first `num_images` held-out images; latents without noise.

    The mean PSNR is that of all images, to rounding the same for any number of ranks. The picture
    shows the first images of rank 0.
    """
    num_images = min(num_images, len(held_out))
    ids = np.array_split(np.arange(num_images), world.world_size)[world.rank]
    # Sharded weights are gathered by all ranks together: one without images takes part with one.
    read = ids if len(ids) else np.zeros(1, dtype=np.int64)

    def evaluate(tracker: Tracker, step: int, prefix: str) -> dict[str, float]:
        # Read anew, so that nothing lies in memory between two evaluations.
        pixels, _ = held_out.shards.read(read)
        target = to_unit(pixels.to(world.device))
        hidden = held_out.read(read).to(world.device).float()
        recon = phase.decode(phase.encode(hidden).latent).float()
        if prefix == "eval" and world.is_main:  # one grid is enough: that of the EMA
            tracker.image("reconstruction", _two_rows(target, recon), step)
        mine = psnr_db(target, recon)[: len(ids)].sum()
        total = mean_over_ranks(mine, world) * world.world_size
        return {f"{prefix}/psnr_db": float(total) / num_images}

    return evaluate


def _two_rows(target: Tensor, recon: Tensor) -> np.ndarray:
    """Images above their reconstructions, as one uint8 picture."""
    rows = torch.stack([target[:NUM_SHOWN], recon[:NUM_SHOWN].clamp(0, 1)])
    grid = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return (grid * 255).byte().cpu().numpy()
