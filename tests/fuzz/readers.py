"""One iteration of each reader's fuzzing, a function of (seed, reader, iteration)."""

from collections.abc import Callable
from pathlib import Path

from tests.fuzz import folders, names, parquets, pictures, stated, tars, zips
from tests.fuzz.content import Source, check_clean, check_damaged, read
from tests.fuzz.damage import damaged
from tests.fuzz.draws import Draw

CLEAN_SHARE = 0.4
"""Iterations whose source is not damaged."""


def iterate(reader: str, seed: int, iteration: int, folder: Path) -> None:
    """Write one source into an empty folder, read it and check the result.

    Raises:
        Fault: The result is wrong.
        Exception: Whatever a reader let escape.
    """
    draw = Draw(seed, reader, iteration)
    READERS[reader](draw, folder, not draw.chance(CLEAN_SHARE))


def source_folder(root: Path, reader: str, seed: int, iteration: int) -> Path:
    """Where the source of an iteration lies."""
    return root / f"{reader}-{seed}-{iteration}"


def _container(build: Callable[[Draw, Path], Source]) -> Callable[[Draw, Path, bool], None]:
    def run(draw: Draw, folder: Path, is_damaged: bool) -> None:
        source = build(draw, folder)
        if not is_damaged:
            check_clean(source, read(source))
            return
        data, may_lose = damaged(draw, source, source.path.read_bytes())
        source.path.write_bytes(data)
        check_damaged(source, read(source), may_lose)

    return run


def _folder(draw: Draw, folder: Path, is_damaged: bool) -> None:
    source = folders.build(draw, folder)
    if not is_damaged:
        check_clean(source, read(source))
        return
    path = folders.damage_target(draw, source)
    data, _ = damaged(draw, Source(path), path.read_bytes())
    path.write_bytes(data)
    check_damaged(source, read(source), may_lose=False)


READERS: dict[str, Callable[[Draw, Path, bool], None]] = {
    "tar": _container(tars.build),
    "zip": _container(zips.build),
    "parquet": _container(parquets.build),
    "folder": _folder,
    "image": pictures.run,
    "labels": stated.run,
    "names": names.run,
}
"""By the name of `--reader`."""
