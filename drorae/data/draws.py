"""Draws of the host (mirroring, crops) as a function of (seed, stream, epoch, id) alone.

Which rank or thread draws for a sample, and with which others, then changes nothing. The generator
is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), written
for whole arrays of ids: numpy's own needs an object for each id, some 20 microseconds.
"""

import hashlib

import numpy as np

__all__ = ["host_uniform", "philox"]

ROUNDS = 10
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW, SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def host_uniform(seed: int, stream: str, epoch: int, ids: np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for each id, float64 [len(ids), count], multiples of 2^-53.

    Args:
        seed: Seed of the run.
        stream: Name of what is drawn; streams are independent.
        epoch: Epoch, in [0, 2^32).
        ids: Sample ids, 0 or more.
        count: Numbers for each id; the first of more are the same.
    """
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
    ids = np.asarray(ids, dtype=np.uint64)[:, None]
    blocks = np.arange((count + 1) // 2, dtype=np.uint64)
    words = philox((ids & LOW, ids >> SHIFT, np.uint64(epoch), blocks), key)
    pairs = np.stack([words[0] << SHIFT | words[1], words[2] << SHIFT | words[3]], axis=-1)
    drawn = pairs.reshape(len(ids), 2 * len(blocks))[:, :count]
    return (drawn >> np.uint64(11)) * 2.0**-53


def philox(counter: tuple[np.ndarray | np.uint64, ...], key: tuple[int, int]) -> list[np.ndarray]:
    """Philox4x32-10 of many counters: four arrays of 32-bit words, held in uint64.

    Args:
        counter: Four words below 2^32, uint64, which broadcast against each other.
        key: Two words below 2^32.
    """
    a, b, c, d = np.broadcast_arrays(*counter)
    for index in range(ROUNDS):
        first, second = (
            np.uint64((word + index * step) % 2**32)
            for word, step in zip(key, KEY_STEPS, strict=True)
        )
        low, high = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c
        a, b, c, d = high >> SHIFT ^ b ^ first, high & LOW, low >> SHIFT ^ d ^ second, low & LOW
    return [a, b, c, d]
