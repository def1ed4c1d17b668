"""Tar archives: class folders, or webdataset (`NAME.jpg` beside `NAME.cls` or `NAME.json`).

Listing reads headers and the small label members; images are read later by offset, also from an
object store. Compressed tar files allow no random access and are refused.
"""

import json
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

from drorae.data.readers.candidates import (
    Candidate,
    Listing,
    ReadRule,
    Record,
    first_folder,
    is_image_name,
    listed,
    printable,
)
from drorae.data.readers.filesystem import open_file
from drorae.data.readers.ranges import Span, read_spans

LABEL_KEYS = ("label", "cls", "class", "class_name")
"""Names under which the JSON beside a webdataset image may give its class."""

READ_AHEAD_BYTES = 8 << 20
"""Headers lie between the images: listing reads an archive from start to end."""


def list_tar(uri: str, name: str, rule: ReadRule) -> Listing:
    """List the images of one tar file.

    Args:
        uri: The tar file.
        name: Its name inside the source; keys start with it.
        rule: Where images and labels are.
    """
    images: list[tuple[str, int, int]] = []
    labels: dict[str, str] = {}
    rejects: list[tuple[str, str]] = []
    with open_file(uri, READ_AHEAD_BYTES) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for info in archive:
                    _sort_member(archive, info, images, labels)
                    # Else every header is kept, 2 kB each.
                    archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
        except (tarfile.TarError, OSError, EOFError) as error:
            rejects.append((printable(name), f"tar archive is damaged or compressed: {error}"))
    table = listed(
        "tar",
        uri,
        keys=[printable(f"{name}/{member}") for member, _, _ in images],
        class_names=[
            labels.get(_stem(member), printable(first_folder(member))) for member, _, _ in images
        ],
        index=[start for _, start, _ in images],
        size_bytes=[size for _, _, size in images],
    )
    return Listing(table, rejects)


def _sort_member(
    archive: tarfile.TarFile,
    info: tarfile.TarInfo,
    images: list[tuple[str, int, int]],
    labels: dict[str, str],
) -> None:
    info.name = info.name.removeprefix("./")
    if not info.isfile():
        return
    if is_image_name(info.name):
        images.append((info.name, info.offset_data, info.size))
    elif info.name.endswith((".cls", ".json")):
        member = archive.extractfile(info)
        label = _label(info.name, member.read() if member else b"")
        if label:
            labels[_stem(info.name)] = label


def _stem(name: str) -> str:
    folder, sign, base = name.rpartition("/")
    return f"{folder}{sign}{base.split('.')[0]}"


def _label(name: str, data: bytes) -> str:
    text = data.decode("utf-8", "replace").strip()
    if name.endswith(".cls"):
        return text
    try:
        fields: Any = json.loads(text)
    except ValueError:
        return ""
    if not isinstance(fields, dict):
        return ""
    return next((str(fields[key]) for key in LABEL_KEYS if key in fields), "")


def tar_span(candidate: Candidate) -> Span:
    """Where the content of a member lies in its archive."""
    return Span(candidate.container, candidate.index, candidate.size_bytes)


def read_tar(candidates: Sequence[Candidate]) -> Iterator[Record]:
    """Read members by offset; neighbours are read together."""
    contents = read_spans([tar_span(candidate) for candidate in candidates])
    for candidate, data in zip(candidates, contents, strict=True):
        if not isinstance(data, OSError):
            yield Record(candidate, data)
        elif data.errno is None:
            yield Record(candidate, None, f"truncated archive: {data}")
        else:
            yield Record(candidate, None, f"cannot be read: {data.strerror}")
