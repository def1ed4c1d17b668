"""The order of training samples: a function of (seed, epoch, step), whatever the workers.

Every epoch is one permutation of all n samples; a step takes the next B = `global_batch` of them.
Remainder rule, that of RAE's training: an epoch is floor(n / B) whole batches, in which floor(n /
B) * B samples are used exactly once, and the last n mod B of the permutation are not. They are
others in every epoch, since each has a permutation of its own, so no sample is lost for ever: the
chance to sit out k epochs in a row is ((n mod B) / n)^k. Where B divides n, every sample is used
exactly once per epoch. A resumed run needs only its step number. The permutation sorts raw Philox
words: their stream is fixed by the algorithm, whereas numpy may change how its `permutation` draws
between versions.
"""

import functools

import numpy as np


def steps_per_epoch(num_samples: int, global_batch: int) -> int:
    """Whole batches in one epoch.

    Raises:
        ValueError: Not even one batch fits.
    """
    if not 1 <= global_batch <= num_samples:
        raise ValueError(
            f"global_batch={global_batch} does not fit {num_samples} samples: expected 1 to "
            f"{num_samples}. Use a smaller batch or more images."
        )
    return num_samples // global_batch


def position(step: int, num_samples: int, global_batch: int) -> tuple[int, int]:
    """Epoch and step within it of a global step (both count from 0).

    Raises:
        ValueError: A negative step, or no batch fits.
    """
    if step < 0:
        raise ValueError(f"step={step} is out of range: expected 0 or more.")
    return divmod(step, steps_per_epoch(num_samples, global_batch))


def batch_ids(
    seed: int, epoch: int, step_in_epoch: int, num_samples: int, global_batch: int
) -> np.ndarray:
    """Sample ids (int64) of one step, for all ranks together.

    Raises:
        ValueError: The step lies outside of the epoch, or no batch fits.
    """
    num_steps = steps_per_epoch(num_samples, global_batch)
    if not 0 <= step_in_epoch < num_steps:
        raise ValueError(
            f"step_in_epoch={step_in_epoch} is out of range: expected 0 to {num_steps - 1}."
        )
    start = step_in_epoch * global_batch
    return _permutation(seed, epoch, num_samples)[start : start + global_batch].copy()


def rank_slice(ids: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The contiguous part of a global batch that one rank works on.

    Raises:
        ValueError: The batch does not divide over the ranks.
    """
    if len(ids) % world_size or not 0 <= rank < world_size:
        lower = len(ids) // world_size * world_size
        raise ValueError(
            f"a global batch of {len(ids)} does not divide over {world_size} workers "
            f"(rank {rank}): use a batch of {lower or world_size} or {lower + world_size}."
        )
    per_rank = len(ids) // world_size
    return ids[rank * per_rank : (rank + 1) * per_rank]


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    key = np.array([seed % 2**64, epoch % 2**64], dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(num_samples)
    return np.argsort(words, kind="stable").astype(np.int64)
