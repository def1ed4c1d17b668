"""From raw images to batches: assets, readers, sharding, sample order, caches, loaders, latents.

`sharding.run_shard` and `latents.run_latents` are stage entries and run on Ray Data through
`shard_map.map_shards`; everything that training reads (`images`, `hidden_states`,
`latents.LatentShards`, `loaders`) is plain files and numpy, without Ray.
"""
