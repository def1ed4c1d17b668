"""One door to all readers: the kind of a source, its candidates, their records."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from drorae.data.assets.catalog import asset_path
from drorae.data.readers.candidates import (
    UNLABELLED,
    Candidate,
    Listing,
    ReadRule,
    Record,
    is_image_name,
    joined,
    sort_class_names,
)
from drorae.data.readers.cifar import list_cifar, read_cifar
from drorae.data.readers.filesystem import (
    LISTING_THREADS,
    ListingProgress,
    check_exists,
    ignore_progress,
    walk,
)
from drorae.data.readers.folder import list_folder, read_files
from drorae.data.readers.parquet import list_parquet, read_parquet
from drorae.data.readers.tar import list_tar, read_tar
from drorae.data.readers.zipped import list_zip, read_zip

ASSET_SCHEME = "asset:"
"""Prefix of a source that `drorae assets fetch` made."""

READERS: dict[str, Callable[[Sequence[Candidate]], Iterator[Record]]] = {
    "file": read_files,
    "tar": read_tar,
    "zip": read_zip,
    "parquet": read_parquet,
    "cifar": read_cifar,
}


def list_source(
    uri: str,
    *,
    image_column: str = "image",
    label_column: str = "label",
    on_progress: ListingProgress = ignore_progress,
) -> Listing:
    """List all candidates of a source, sorted by key, every one with a class name.

    No image is read. Memory and time grow with the images (`Listing`), requests with the containers
    or, in an image folder on S3, by one for 1,000 images.

    Args:
        uri: Folder, .tar, .zip or .parquet file, a folder of those, an s3:// place, or
            `asset:cifar10`.
        image_column: Image column of Parquet files.
        label_column: Label column of Parquet files.
        on_progress: Called with (folders or containers listed, in all).

    Raises:
        FileNotFoundError: The source does not exist.
        ValueError: Nothing in it looks like an image.
    """
    rule = ReadRule(image_column=image_column, label_column=label_column)
    listing = _list_any(uri, rule, on_progress)
    if not len(listing):
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


def _list_any(uri: str, rule: ReadRule, on_progress: ListingProgress) -> Listing:
    def list_containers(root: str, uris: Sequence[str]) -> Listing:
        def list_one(container: str) -> Listing:
            name = container[len(root) :].lstrip("/")
            return _list_container(container, name, rule)

        return _list_each(uris, list_one, on_progress)

    if uri.startswith(ASSET_SCHEME):
        return list_cifar(str(asset_path(uri.removeprefix(ASSET_SCHEME))))
    if _container_suffix(uri):
        check_exists(uri)
        return list_containers(uri.rpartition("/")[0], [uri])
    names, rejects = walk(uri, on_progress)
    containers = [name for name in names if _container_suffix(name)]
    if containers and not any(is_image_name(name) for name in names):
        root = uri.rstrip("/")
        return list_containers(root, [f"{root}/{name}" for name in containers])
    return list_folder(uri, names, rejects)


def _container_suffix(name: str) -> str:
    suffixes = (".tar", ".zip", ".parquet", ".tar.gz", ".tgz")
    return next((suffix for suffix in suffixes if name.lower().endswith(suffix)), "")


def _list_container(uri: str, name: str, rule: ReadRule) -> Listing:
    suffix = _container_suffix(uri)
    if suffix == ".zip":
        return list_zip(uri, name, rule)
    if suffix == ".parquet":
        return list_parquet(uri, name, rule)
    return list_tar(uri, name, rule)


def _list_each(
    uris: Sequence[str], list_one: Callable[[str], Listing], on_progress: ListingProgress
) -> Listing:
    parts: list[Listing] = []
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        for part in pool.map(list_one, uris):
            parts.append(part)
            on_progress(len(parts), len(uris))
    return Listing(
        table=joined([part.table for part in parts]),
        rejects=[reject for part in parts for reject in part.rejects],
        class_names=next((part.class_names for part in parts if part.class_names), ()),
    )


def _complete(listing: Listing) -> Listing:
    """Sorted by key, and with a class for every candidate."""
    table = listing.table.sort_by("key").combine_chunks()
    classes: Any = table["class_name"].combine_chunks()
    is_named = np.array([name != "" for name in classes.dictionary.to_pylist()], bool)
    has_class = is_named[classes.indices.to_numpy()]
    rejects = list(listing.rejects)
    if has_class.any():
        left_out = table.filter(pa.array(~has_class))["key"].to_pylist()
        rejects += [(key, "has no label although others have") for key in left_out]
        table = table.filter(pa.array(has_class)).combine_chunks()
    else:
        codes = np.zeros(len(table), np.int32)
        everything = pa.DictionaryArray.from_arrays(codes, pa.array([UNLABELLED]))
        position = table.schema.get_field_index("class_name")
        table = table.set_column(position, table.schema.field(position), everything)
    names = listing.class_names or tuple(
        sort_class_names(set(table["class_name"].unique().to_pylist()))
    )
    return Listing(table, rejects, names)
