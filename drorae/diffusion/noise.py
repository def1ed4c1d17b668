"""Random numbers as a function of (seed, stream, id) alone, drawn where they are used.

Which worker draws a sample, with which others in a batch and on which device, then changes neither
an image nor a metric. The generator is counter-based (Philox 4x32-10, doi:10.1145/2063384.2063405):
the key of a sample is a 64-bit hash of (seed, stream) plus its id, the counter the place within the
sample. Ids of one stream never share a key; two streams of n ids overlap with probability n / 2^63.

The uniform numbers are torch's stateless Philox (`torch.func._random`, experimental, hence only in
this file), whose 24 bits are the same on every device; tests compare them with Philox written out.
Normal ones are made of them by Box-Muller in plain tensor operations, so that CPU and CUDA differ
by the rounding of log, sine and cosine only. torch's own stateless normal uses fast intrinsics on
CUDA, which differ more, and is slower on a CPU. Milliseconds for 32 x 768 x 16 x 16 on one core of
an AMD EPYC, 2026-11-25: this 48, through the inverse error function 38 (which loses the tail beyond
5.4 standard deviations; Box-Muller reaches 5.8), torch's stateless normal 86, one seeded
generator a sample 28, a 32-bit integer hash in tensor operations 136 before any transformation.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.func._random as stateless

from drorae.shapes import Float, Tensor

__all__ = ["noise", "uniform"]

CPU = torch.device("cpu")

Ids = Tensor | np.ndarray | Sequence[int]


def noise(
    seed: int, stream: str, ids: Ids, shape: Sequence[int], device: torch.device = CPU
) -> Float[Tensor, "batch ..."]:
    """Standard normal numbers, float32.

    Args:
        seed: Seed of the run.
        stream: Name of what is drawn, for example `diffusion/noise`; streams are independent.
        ids: One integer in [0, 2^63) per sample, on the CPU; a sample's numbers depend on its own
            id only.
        shape: Shape of one sample.
        device: Where to draw. Nothing waits for it.

    Raises:
        ValueError: An id is negative or no integer.
    """
    count = math.prod(shape)
    drawn = uniform(seed, stream, ids, (2, (count + 1) // 2), device)
    # 1 - u lies in (0, 1], so the logarithm is finite.
    radius = drawn[:, 0].neg_().log1p_().mul_(-2).sqrt_()
    angle = drawn[:, 1].mul_(2 * math.pi)
    sine = angle.sin().mul_(radius)
    angle.cos_().mul_(radius)
    radius.copy_(sine)
    return drawn.flatten(1)[:, :count].reshape(-1, *shape)


def uniform(
    seed: int, stream: str, ids: Ids, shape: Sequence[int], device: torch.device = CPU
) -> Float[Tensor, "batch ..."]:
    """Uniform numbers in [0, 1), float32 multiples of 2^-24; arguments and errors as `noise`."""
    keys = torch.from_numpy(_keys(seed, stream, _checked(ids))).to(device, non_blocking=True)
    drawn = torch.empty(len(keys), math.prod(shape), device=device)
    return stateless.uniform_(keys[:, None], drawn).view(-1, *shape)


def _keys(seed: int, stream: str, ids: np.ndarray) -> np.ndarray:
    """Philox keys (number, place in its sequence), uint64 [ids, 2]."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    keys = np.zeros((len(ids), 2), dtype=np.uint64)
    keys[:, 0] = ids.view(np.uint64) + np.frombuffer(digest, "<u8", count=1)  # modulo 2^64
    return keys


def _checked(ids: Ids) -> np.ndarray:
    found = np.asarray(ids, dtype=None if len(ids) else np.int64)
    if found.dtype != np.int64 or found.ndim != 1:
        raise ValueError(f"ids are {found.dtype} {list(found.shape)}: expected a row of int64.")
    if len(found) and found.min() < 0:
        raise ValueError(f"id {found.min()} is out of range: expected 0 <= id < 2^63.")
    return np.ascontiguousarray(found)
