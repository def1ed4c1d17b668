"""One door to all readers: the kind of a source, its candidates, their records."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from os.path import expanduser

from drorae.data.assets.catalog import asset_path
from drorae.data.readers.archives import CONTAINER_SUFFIXES
from drorae.data.readers.assembling import Part, assemble
from drorae.data.readers.candidates import (
    Candidate,
    Listing,
    Note,
    ReadRule,
    Record,
    group_by_container,
    is_image_name,
    joined,
    printable,
)
from drorae.data.readers.cifar import list_cifar, read_cifar
from drorae.data.readers.completing import complete
from drorae.data.readers.damage import is_of_machine
from drorae.data.readers.filesystem import (
    LISTING_THREADS,
    ListingProgress,
    check_exists,
    ignore_progress,
    is_folder,
    is_remote,
    walk,
)
from drorae.data.readers.folder import (
    SPARK_FILES,
    is_container_name,
    list_folder,
    read_files,
    sorted_out,
)
from drorae.data.readers.parquet import list_parquet, read_parquet
from drorae.data.readers.tar import list_tar, read_tar
from drorae.data.readers.zipped import list_zip, read_zip
from drorae.failure import Fatal

ASSET_SCHEME = "asset:"
"""Prefix of a source that `drorae assets fetch` made."""

READERS: dict[str, Callable[[Sequence[Candidate]], Iterator[Record]]] = {
    "file": read_files,
    "tar": read_tar,
    "zip": read_zip,
    "parquet": read_parquet,
    "cifar": read_cifar,
}

BESIDE_CONTAINERS = "lies beside containers that hold most images"
HOLDS_NONE = "holds no image"
BESIDE_PICTURES = "holds {} images, but most lie beside it as files: set shard.source to it alone"


def list_source(
    uri: str,
    rule: ReadRule | None = None,
    *,
    on_progress: ListingProgress = ignore_progress,
) -> Listing:
    """List all candidates of a source, sorted by key, with classes and splits.

    Every one has a class name, but for validation images that lie flat where training images do
    not (`completing`). No image is read. Memory and time grow with the images (`Listing`), requests
    with the containers or, in an image folder on S3, by one for 1,000 images.

    Args:
        uri: Folder, .tar, .zip or .parquet file, a folder of those, an s3:// place, or
            `asset:cifar10`.
        rule: How images, labels and splits are found; none: the defaults.
        on_progress: Called with (folders or containers listed, in all).

    Raises:
        FileNotFoundError: The source does not exist.
        ValueError: Nothing in it looks like an image, or its labels cannot be understood.
    """
    try:
        listing = complete(_list_any(expanduser(uri), rule or ReadRule(), on_progress))
    except ValueError as error:
        if uri in str(error) or repr(uri) in str(error):
            raise
        raise ValueError(f"source {uri!r}: {error}") from error
    if not len(listing):
        reasons = "; ".join(f"{key}: {reason}" for key, reason in listing.rejects[:5])
        raise ValueError(
            f"source {uri!r} holds no image{f' ({reasons})' if reasons else ''}: expected image "
            "files, .tar, .zip or .parquet files. Correct shard.source."
        )
    return listing


def check_source(uri: str) -> None:
    """Raise at once what can be known of a source without listing it: a missing asset or path.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: An unknown asset.
    """
    if uri.startswith(ASSET_SCHEME):
        asset_path(uri.removeprefix(ASSET_SCHEME))
    else:
        check_exists(expanduser(uri))


def read_records(candidates: Sequence[Candidate]) -> Iterator[Record]:
    """Content of candidates, in their order; neighbours of one container are read together.

    What a reader did not expect is an error of the candidates of that container.

    Raises:
        OSError: A disk or an object store failed, which says nothing of an image.
        RuntimeError: The same.
    """
    start = 0
    for stop in range(1, len(candidates) + 1):
        if stop == len(candidates) or candidates[stop].kind != candidates[start].kind:
            yield from _read_run(candidates[start:stop])
            start = stop


def _read_run(candidates: Sequence[Candidate]) -> Iterator[Record]:
    """Content of candidates of one kind."""
    while candidates:
        num_read = 0
        try:
            for record in READERS[candidates[0].kind](candidates):
                yield record
                num_read += 1
            return
        except Exception as error:
            if _is_of_store(error):
                raise
            _, rest = next(group_by_container(candidates[num_read:]))
            reason = f"cannot be read: {type(error).__name__}: {error}"
            yield from (Record(candidate, None, reason) for candidate in rest)
            candidates = candidates[num_read + len(rest) :]


def _is_of_store(error: Exception) -> bool:
    """Whether an error tells of a disk or an object store, and not of what lies there."""
    # Arrow's and Python's errors of content derive from RuntimeError too.
    return isinstance(error, OSError | Fatal) or type(error) is RuntimeError


def _list_any(uri: str, rule: ReadRule, on_progress: ListingProgress) -> Listing:
    if uri.startswith(ASSET_SCHEME):
        return list_cifar(str(asset_path(uri.removeprefix(ASSET_SCHEME))))
    if is_container_name(uri) and not is_folder(uri):
        check_exists(uri)
        root, _, name = uri.rpartition("/")
        return assemble(list(_parts(root, [name], rule, on_progress)), rule)
    names, walked = walk(uri, on_progress)
    rejects = [(printable(key), reason) for key, reason in walked]
    names = [name for name in names if name.rpartition("/")[2] not in SPARK_FILES]
    containers = [name for name in names if is_container_name(name)]
    root = uri.rstrip("/")
    if not containers:
        found = assemble([Part("", list_folder(uri, names, rule))], rule)
    elif any(is_image_name(name) for name in names):
        found = _list_mixed(root, names, rule, on_progress)
    else:
        found = _list_containers(root, containers, rule, on_progress)
        found = _with_rejects(found, _beside_containers(names))
    return _with_rejects(found, rejects)


def _list_containers(
    root: str, names: Sequence[str], rule: ReadRule, on_progress: ListingProgress
) -> Listing:
    """Containers alone: tables beside archives may be those of captions, as img2dataset writes."""
    are_tables = [name.lower().endswith(".parquet") for name in names]
    is_mixed = any(are_tables) and not all(are_tables)
    parts = list(_parts(root, names, rule, on_progress, others_hold_images=is_mixed))
    empty = [p.name for p in parts if is_mixed and not len(p.listing) and p.listing.rejects]
    if not empty or len(empty) == len(parts):
        return assemble(parts, rule)
    kept = [part for part in parts if part.name not in set(empty)]
    found = assemble(kept, rule)
    text = f"{len(empty)} of {len(parts)} containers hold no image that is read, such as "
    note = Note(f"{text}{printable(empty[0])!r}; the rejects say why", is_doubtful=True)
    rejects = [r for part in parts if part.name in set(empty) for r in part.listing.rejects]
    return _with_rejects(replace(found, notes=(*found.notes, note)), rejects)


def _list_mixed(
    root: str, names: Sequence[str], rule: ReadRule, on_progress: ListingProgress
) -> Listing:
    """Pictures beside containers: what holds most images is the source, the rest are rejects."""
    containers = [name for name in names if is_container_name(name)]
    parts = list(_parts(root, containers, rule, on_progress, others_hold_images=True))
    in_parts = sum(len(part.listing) for part in parts)
    pictures = sum(is_image_name(name) for name in names)
    if not in_parts and pictures < len(parts):
        raise ValueError(
            f"{pictures} pictures lie beside {len(parts)} containers in which no image was found "
            f"({_first_reason(parts)}): expected the one or the other. Correct what is said of the "
            "containers, or set shard.source to the pictures alone."
        )
    text = f"{pictures} pictures lie beside {len(parts)} containers with {in_parts} images: only "
    if pictures > in_parts:
        files = [name for name in names if not is_container_name(name)]
        found = assemble([Part("", list_folder(root, files, rule))], rule)
        left_out = []
        for part in parts:
            reason = BESIDE_PICTURES.format(len(part.listing))
            whole = [(printable(part.name), reason)] if len(part.listing) else []
            left_out += whole or part.listing.rejects or [(printable(part.name), HOLDS_NONE)]
        text += "the pictures are read; "
    else:
        found = assemble(parts, rule)
        left_out = _beside_containers(names)
        text += "the containers are read; "
    note = Note(f"{text}set shard.source to the part that is meant", is_doubtful=True)
    return _with_rejects(replace(found, notes=(note, *found.notes)), left_out)


def _first_reason(parts: Sequence[Part]) -> str:
    reasons = (reason for part in parts for _, reason in part.listing.rejects)
    return next(reasons, "they are empty")


def _beside_containers(names: Sequence[str]) -> list[tuple[str, str]]:
    files, rejects, _ = sorted_out(names)
    return [*rejects, *((printable(name), BESIDE_CONTAINERS) for name in files)]


def _with_rejects(listing: Listing, rejects: Iterable[tuple[str, str]]) -> Listing:
    return replace(listing, rejects=[*listing.rejects, *rejects])


def _parts(
    root: str,
    names: Sequence[str],
    rule: ReadRule,
    on_progress: ListingProgress,
    *,
    others_hold_images: bool = False,
) -> Iterator[Part]:
    """Listings of containers, in their order.

    Args:
        root: Folder of the containers.
        names: Their names in it.
        rule: How images and labels are found.
        on_progress: Called with (containers listed, in all).
        others_hold_images: Whether a container without an image column may be something else.
    """

    def list_one(name: str) -> Listing:
        uri = f"{root}/{name}" if root or name.startswith("/") else name
        try:
            return _list_container(uri, name, rule)
        except ValueError as error:
            if not others_hold_images:
                raise
            return Listing(joined([]), [(printable(name), str(error).replace(uri, name))])
        except Exception as error:
            if is_of_machine(error) or (is_remote(uri) and _is_of_store(error)):
                raise
            reason = f"cannot be listed: {type(error).__name__}: {error}"
            return Listing(joined([]), [(printable(name), reason)])

    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        for done, (name, listing) in enumerate(
            zip(names, pool.map(list_one, names), strict=True), 1
        ):
            yield Part(name, listing)
            on_progress(done, len(names))


def _list_container(uri: str, name: str, rule: ReadRule) -> Listing:
    suffix = next(s for s in CONTAINER_SUFFIXES if name.lower().endswith(s))
    if suffix == ".zip":
        return list_zip(uri, name, rule)
    if suffix == ".parquet":
        return list_parquet(uri, name, rule)
    return list_tar(uri, name, rule)
