"""Tar archives: class folders, or webdataset (`NAME.jpg` beside `NAME.cls` or `NAME.json`).

Listing reads headers and the small label members; images are read later by offset, also from an
object store. Compressed tar files allow no random access and are refused.
"""

import json
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from drorae.data.readers.candidates import (
    Candidate,
    Listing,
    Record,
    first_folder,
    group_by_container,
    is_image_name,
    printable,
)
from drorae.data.readers.filesystem import open_file, read_range

LABEL_KEYS = ("label", "cls", "class", "class_name")
"""Names under which the JSON beside a webdataset image may give its class."""


def list_tar(uri: str, name: str) -> Listing:
    """List the images of one tar file.

    Args:
        uri: The tar file.
        name: Its name inside the source; keys start with it.
    """
    images: list[tarfile.TarInfo] = []
    labels: dict[str, str] = {}
    rejects: list[tuple[str, str]] = []
    with open_file(uri) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for info in archive:
                    _sort_member(archive, info, images, labels)
        except (tarfile.TarError, OSError, EOFError) as error:
            rejects.append((printable(name), f"tar archive is damaged or compressed: {error}"))
    candidates = [
        Candidate(
            key=printable(f"{name}/{info.name}"),
            class_name=labels.get(_stem(info.name), printable(first_folder(info.name))),
            split="",
            kind="tar",
            container=uri,
            index=info.offset_data,
            size_bytes=info.size,
        )
        for info in images
    ]
    return Listing(candidates=candidates, rejects=rejects)


def _sort_member(
    archive: tarfile.TarFile,
    info: tarfile.TarInfo,
    images: list[tarfile.TarInfo],
    labels: dict[str, str],
) -> None:
    info.name = info.name.removeprefix("./")
    if not info.isfile():
        return
    if is_image_name(info.name):
        images.append(info)
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


def read_tar(candidates: Sequence[Candidate]) -> Iterator[Record]:
    """Read members by offset; one open file per archive."""
    for container, members in group_by_container(candidates):
        try:
            with open_file(container) as file:
                yield from _read_members(file, members)
        except OSError as error:
            yield from (Record(c, None, f"cannot be read: {error}") for c in members)


def _read_members(file: BinaryIO, members: Sequence[Candidate]) -> Iterator[Record]:
    for candidate in members:
        try:
            data = read_range(file, candidate.index, candidate.size_bytes, candidate.container)
        except OSError as error:
            yield Record(candidate, None, f"truncated archive: {error}")
        else:
            yield Record(candidate, data)
