"""What a tokenizer loop shows of itself: PSNR on a few held-out images, and a grid of them.

The loop calls the same function with the EMA in place and with the online weights.
"""

from collections.abc import Callable

import numpy as np
import torch

from drorae.data.hidden_states import HiddenStates, to_unit
from drorae.tracking import Tracker
from drorae.training.tokenizer import TokenizerPhase

__all__ = ["Evaluator", "psnr_db", "reconstruction_evaluator"]

NUM_SHOWN = 8  # images in the logged grid
Evaluator = Callable[[Tracker, int, str], dict[str, float]]


def psnr_db(images: torch.Tensor, recon: torch.Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB, both in [0,1]."""
    error = (images - recon.clamp(0, 1)).square().flatten(1).mean(1).clamp_min(1e-10)
    return float((-10.0 * error.log10()).mean())


def reconstruction_evaluator(
    phase: TokenizerPhase, held_out: HiddenStates, num_images: int = 64
) -> Evaluator:
    """Build an evaluator of the first `num_images` held-out images; latents without noise."""
    ids = np.arange(min(num_images, len(held_out)))

    def evaluate(tracker: Tracker, step: int, prefix: str) -> dict[str, float]:
        device = next(phase.trainable.parameters()).device
        # Read anew, so that nothing lies in memory between two evaluations.
        pixels, _ = held_out.shards.read(ids)
        target = to_unit(pixels).to(device)
        hidden = held_out.read(ids).to(device).float()
        recon = phase.decode(phase.encode(hidden).latent).float()
        if prefix == "eval":  # one grid is enough: that of the EMA
            rows = torch.stack([target[:NUM_SHOWN], recon[:NUM_SHOWN].clamp(0, 1)])
            grid = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # two rows of images
            tracker.image("reconstruction", (grid * 255).byte().cpu().numpy(), step)
        return {f"{prefix}/psnr_db": psnr_db(target, recon)}

    return evaluate
