"""An epoch from a remote workspace through the loader, the plan and the cache of a node."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from shard_fakes import as_remote, latent_output

from drorae.data.jobs import OrderConfig
from drorae.data.latent_shards import LatentShards
from drorae.data.loaders import latent_batches
from drorae.data.order import node_plan
from drorae.data.shard_cache import ShardCache

ROWS = (24,) * 29 + (11,)
BATCH, STREAMS, WINDOW, EPOCH_STEPS = 16, 8, 1, sum(ROWS) // 16
DELIVERY = {
    "seed": 3,
    "global_batch": BATCH,
    "order": OrderConfig(streams=STREAMS, window_shards=WINDOW),
    "threads": 2,
}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_fetches_the_shards_of_its_part_once_an_epoch_within_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
):
    output, _ = latent_output(tmp_path, ROWS)
    local = LatentShards(output)
    remote_output, remote = as_remote(output, monkeypatch)
    shard_bytes = max(entry.size_bytes for entry in output.manifest.files)
    cache = ShardCache(tmp_path / "cache", limit_bytes=18 * shard_bytes)
    part = {**DELIVERY, "rank": rank, "world_size": 2, "num_steps": EPOCH_STEPS}
    distant = latent_batches(LatentShards(remote_output, cache=cache), **part)
    for expected, batch in zip(latent_batches(local, **part), distant, strict=True):
        np.testing.assert_array_equal(batch.latents, expected.latents)
        np.testing.assert_array_equal(batch.labels, expected.labels)
        assert cache.used_bytes() <= cache.limit_bytes
    sizes = {entry.name: entry.size_bytes for entry in output.manifest.files}
    whole = Counter(
        name for name, _, end in remote.requests if end == sizes.get(name.removeprefix("latents/"))
    )
    places = range(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    plan = node_plan(3, ROWS, BATCH, STREAMS, WINDOW, positions=places, steps=range(EPOCH_STEPS))
    planned = {f"latents/train/part-{use.shard:05d}.arrow" for use in plan}
    assert len(planned) < 20  # of 30
    assert set(whole) == planned
    assert max(whole.values()) == 1
