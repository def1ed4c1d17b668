"""Image folder: every image file is a candidate and the first folder level is its class.

The key is the relative path, so equal file names in two classes never clash.
"""

from collections.abc import Iterator, Sequence

from drorae.data.readers.candidates import (
    Candidate,
    Listing,
    Record,
    first_folder,
    is_image_name,
    listed,
    printable,
)
from drorae.data.readers.ranges import Span, read_spans


def list_folder(uri: str, names: Sequence[str], rejects: list[tuple[str, str]]) -> Listing:
    """List the images among the relative file names of a folder.

    Args:
        uri: The folder.
        names: Relative names, sorted.
        rejects: What the walk already refused.
    """
    images = [name for name in names if is_image_name(name)]
    refused = [(printable(key), reason) for key, reason in rejects]
    if any(first_folder(name) for name in images):
        stray = [name for name in images if not first_folder(name)]
        refused += [(printable(name), "lies outside of every class folder") for name in stray]
        images = [name for name in images if first_folder(name)]
    table = listed(
        "file",
        uri.rstrip("/"),
        keys=[printable(name) for name in images],
        class_names=[printable(first_folder(name)) for name in images],
        member=images,
    )
    return Listing(table, refused)


def file_span(candidate: Candidate) -> Span:
    """Where the file of a candidate lies."""
    names = (candidate.container, candidate.member)
    return Span("/".join(name for name in names if name))


def read_files(candidates: Sequence[Candidate]) -> Iterator[Record]:
    """Read whole files, several at a time; one that cannot be read gives a record with an error."""
    contents = read_spans([file_span(candidate) for candidate in candidates])
    for candidate, data in zip(candidates, contents, strict=True):
        if isinstance(data, OSError):
            yield Record(candidate, None, f"cannot be read: {data.strerror or data}")
        else:
            yield Record(candidate, data)
