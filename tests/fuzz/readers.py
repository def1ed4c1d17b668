"""One iteration of each reader's fuzzing, a function of (seed, reader, iteration)."""

import gzip
from collections.abc import Callable
from pathlib import Path

from tests.fuzz import folders, names, parquets, pictures, several, stated, tars, zips
from tests.fuzz.content import Source, check_clean, check_damaged, read
from tests.fuzz.damage import damaged
from tests.fuzz.draws import Draw

CLEAN_SHARE = 0.4
"""Iterations whose source is not damaged."""

OTHER_CONTENT = (b"", b"\0" * 4096, gzip.compress(b"text"), b"PK\x05\x06" + bytes(18), b"PAR1PAR1")
"""What may lie under the name of a container; some of it is an empty one."""


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
        if draw.chance(0.05):
            data, may_lose = draw.pick(OTHER_CONTENT), True
        source.path.write_bytes(data)
        check_damaged(source, read(source), may_lose)

    return run


def _folder(draw: Draw, folder: Path, is_damaged: bool) -> None:
    source = draw.pick((folders.build, folders.build, several.build))(draw, folder)
    if not is_damaged:
        check_clean(source, read(source))
        return
    path = folders.damage_target(draw, source)
    data, may_lose = damaged(draw, Source(path), path.read_bytes())
    path.write_bytes(data)
    check_damaged(source, read(source), may_lose=may_lose and path.suffix in (".tar", ".parquet"))


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
