"""One door to all readers: the kind of a source, its candidates, their records."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from drorae.data.assets.catalog import asset_path
from drorae.data.readers.candidates import (
    UNLABELLED,
    Candidate,
    Listing,
    Record,
    is_image_name,
    sort_class_names,
)
from drorae.data.readers.cifar import list_cifar, read_cifar
from drorae.data.readers.filesystem import check_exists, walk
from drorae.data.readers.folder import list_folder, read_files
from drorae.data.readers.parquet import list_parquet, read_parquet
from drorae.data.readers.tar import list_tar, read_tar
from drorae.data.readers.zipped import list_zip, read_zip

ASSET_SCHEME = "asset:"
"""Prefix of a source that `drorae assets fetch` made."""

LISTING_THREADS = 8
"""Containers listed at the same time; listing waits for the store, not for a CPU."""

READERS: dict[str, Callable[[Sequence[Candidate]], Iterator[Record]]] = {
    "file": read_files,
    "tar": read_tar,
    "zip": read_zip,
    "parquet": read_parquet,
    "cifar": read_cifar,
}


def list_source(uri: str, *, image_column: str = "image", label_column: str = "label") -> Listing:
    """List all candidates of a source, sorted by key, every one with a class name.

    Args:
        uri: Folder, .tar, .zip or .parquet file, a folder of those, an s3:// place, or
            `asset:cifar10`.
        image_column: Image column of Parquet files.
        label_column: Label column of Parquet files.

    Raises:
        FileNotFoundError: The source does not exist.
        ValueError: Nothing in it looks like an image.
    """
    listing = _list_any(uri, image_column, label_column)
    if not listing.candidates:
        reasons = "; ".join(f"{key}: {reason}" for key, reason in listing.rejects[:5])
        raise ValueError(
            f"source {uri!r} holds no image{f' ({reasons})' if reasons else ''}: expected image "
            "files, .tar, .zip or .parquet files. Correct shard.source."
        )
    return _complete(listing)


def check_source(uri: str) -> None:
    """Raise at once what can be known of a source without listing it: a missing asset or path.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: An unknown asset.
    """
    if uri.startswith(ASSET_SCHEME):
        asset_path(uri.removeprefix(ASSET_SCHEME))
    else:
        check_exists(uri)


def read_records(candidates: Sequence[Candidate]) -> Iterator[Record]:
    """Content of candidates, in their order; neighbours of one container are read together."""
    start = 0
    for stop in range(1, len(candidates) + 1):
        if stop == len(candidates) or candidates[stop].kind != candidates[start].kind:
            yield from READERS[candidates[start].kind](candidates[start:stop])
            start = stop


def _list_any(uri: str, image_column: str, label_column: str) -> Listing:
    if uri.startswith(ASSET_SCHEME):
        return list_cifar(str(asset_path(uri.removeprefix(ASSET_SCHEME))))
    suffix = _container_suffix(uri)
    if suffix:
        check_exists(uri)
        return _list_containers(uri.rpartition("/")[0], [uri], image_column, label_column)
    names, rejects = walk(uri)
    containers = [name for name in names if _container_suffix(name)]
    if containers and not any(is_image_name(name) for name in names):
        uris = [f"{uri.rstrip('/')}/{name}" for name in containers]
        return _list_containers(uri.rstrip("/"), uris, image_column, label_column)
    return list_folder(uri, names, rejects)


def _container_suffix(name: str) -> str:
    suffixes = (".tar", ".zip", ".parquet", ".tar.gz", ".tgz")
    return next((suffix for suffix in suffixes if name.lower().endswith(suffix)), "")


def _list_containers(
    root: str, uris: Sequence[str], image_column: str, label_column: str
) -> Listing:
    def list_one(uri: str) -> Listing:
        name = uri[len(root) :].lstrip("/")
        suffix = _container_suffix(uri)
        if suffix == ".zip":
            return list_zip(uri, name)
        if suffix == ".parquet":
            return list_parquet(uri, name, image_column, label_column)
        return list_tar(uri, name)

    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        parts = list(pool.map(list_one, uris))
    return Listing(
        candidates=[candidate for part in parts for candidate in part.candidates],
        rejects=[reject for part in parts for reject in part.rejects],
        class_names=next((part.class_names for part in parts if part.class_names), ()),
    )


def _complete(listing: Listing) -> Listing:
    named = {c.class_name for c in listing.candidates if c.class_name}
    rejects = list(listing.rejects)
    candidates = []
    for c in sorted(listing.candidates, key=lambda c: c.key):
        if c.class_name or not named:
            candidates.append(c if c.class_name else _renamed(c, UNLABELLED))
        else:
            rejects.append((c.key, "has no label although others have"))
    names = listing.class_names or tuple(sort_class_names({c.class_name for c in candidates}))
    return Listing(candidates=candidates, rejects=rejects, class_names=names)


def _renamed(candidate: Candidate, class_name: str) -> Candidate:
    row = candidate.to_row()
    row[1] = class_name
    return Candidate(*row)
