"""Made-up outputs of stages, complete with index and manifest."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from drorae.data.shard_format import part_name, write_index, write_latent_shard
from drorae.store import files
from drorae.store.files import FileEntry
from drorae.store.manifest import MANIFEST_NAME, Manifest, encode_manifest
from drorae.store.workspace import StageOutput

NUM_CLASSES = 1000


def write_latents(
    uri: str, num_shards: int, rows: int, shape: tuple[int, int, int], seed: int
) -> StageOutput:
    """An output of the stage `latents`, one view."""
    draw = np.random.default_rng(seed)
    latents = draw.standard_normal((rows, *shape), np.float32).astype(np.float16)
    parts = []
    for number in range(num_shards):
        latents[:, 0, 0, 0] = number  # another content, so another digest
        labels = draw.integers(0, NUM_CLASSES, rows, dtype=np.int32)
        name = part_name("train", number)
        parts.append(write_latent_shard(uri, name, {"latent": latents}, labels, number * rows))
    counts = files.write_json(files.join(uri, "counts.json"), {"shape": list(shape), "flip": False})
    entries = [part.entry for part in parts] + [write_index(uri, "train", parts)]
    entries.append(replace(counts, name="counts.json"))
    return committed(uri, "latents", entries)


def committed(uri: str, stage: str, entries: Iterable[FileEntry]) -> StageOutput:
    """The output with these files, and its manifest."""
    manifest = Manifest(
        stage=stage,
        key=uri.rpartition("/")[2],
        version="1",
        config={},
        input_keys={},
        files=tuple(sorted(entries, key=lambda entry: entry.name)),
        metrics={},
        seed=0,
        code_digest="",
        packages={},
        hardware={},
        wall_s=0.0,
        device_hours=0.0,
        attempt=1,
        run_ids={},
        created_at="",
    )
    files.write_json(files.join(uri, MANIFEST_NAME), encode_manifest(manifest))
    return StageOutput(uri=uri, manifest=manifest)
