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
    printable,
)
from drorae.data.readers.filesystem import open_file, store_errors


def list_folder(uri: str, names: Sequence[str], rejects: list[tuple[str, str]]) -> Listing:
    """List the images among the relative file names of a folder.

    Args:
        uri: The folder.
        names: Relative names, sorted.
        rejects: What the walk already refused.
    """
    images = [name for name in names if is_image_name(name)]
    has_classes = any(first_folder(name) for name in images)
    listed: list[Candidate] = []
    refused = [(printable(key), reason) for key, reason in rejects]
    for name in images:
        if has_classes and not first_folder(name):
            refused.append((printable(name), "lies outside of every class folder"))
            continue
        listed.append(
            Candidate(
                key=printable(name),
                class_name=printable(first_folder(name)),
                split="",
                kind="file",
                container=f"{uri.rstrip('/')}/{name}",
            )
        )
    return Listing(candidates=listed, rejects=refused)


def read_files(candidates: Sequence[Candidate]) -> Iterator[Record]:
    """Read whole files; a file that cannot be read gives a record with an error."""
    for candidate in candidates:
        try:
            with store_errors(candidate.container), open_file(candidate.container) as file:
                data = file.read()
        except OSError as error:
            yield Record(candidate, None, f"cannot be read: {error.strerror or error}")
        else:
            yield Record(candidate, data)
