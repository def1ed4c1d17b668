"""From raw images to batches: assets, readers, sharding, sample order, caches, loaders, latents.

`sharding.run_shard` and `latents.run_latents` are stage entries and run on Ray Data through
`shard_map.map_shards`. They write the files of `shard_format`; all that training reads (`images`,
`random_crops`, `latent_shards`, `hidden_states`, `loaders`) reads them through `store`, which maps
local shards and keeps those of a remote workspace in `shard_cache`, without Ray.
"""
