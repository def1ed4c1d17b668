"""The order of training samples: a function of (seed, epoch, step), whatever the workers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ShardUse:
    """When a group of ranks needs a shard."""

    shard: int
    """Number of the shard in its split, from 0."""
    first_step: int
    """Global step of the first batch that holds one of its rows."""
    last_step: int
    """Global step of the last batch that does."""
