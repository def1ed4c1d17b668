"""Zip archives of images; the first folder inside the archive is the class."""

import zipfile
import zlib
from collections.abc import Iterator, Sequence

from drorae.data.readers.candidates import (
    Candidate,
    Listing,
    Record,
    group_by_container,
    is_image_name,
    printable,
)
from drorae.data.readers.filesystem import open_file

READ_ERRORS = (OSError, NotImplementedError, KeyError, zipfile.BadZipFile, zlib.error)
"""What zipfile raises for a damaged or unsupported member. A RuntimeError is that of an object
store, and no fault of the image."""

ENCRYPTED_FLAG = 0x1


def list_zip(uri: str, name: str) -> Listing:
    """List the images of one zip file; one common top folder around the class folders is ignored.

    Args:
        uri: The zip file.
        name: Its name inside the source; keys start with it.
    """
    with open_file(uri) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = [i.filename for i in archive.infolist() if not i.is_dir()]
        except zipfile.BadZipFile as error:
            return Listing([], [(printable(name), f"zip archive is damaged: {error}")])
    images = sorted({m for m in members if is_image_name(m) and not m.startswith("__MACOSX/")})
    depth = _class_depth(images)
    candidates = [
        Candidate(
            key=printable(f"{name}/{member}"),
            class_name=printable(_folder_at(member, depth)),
            split="",
            kind="zip",
            container=uri,
            member=member,
        )
        for member in images
    ]
    return Listing(candidates=candidates, rejects=[])


def _folder_at(member: str, depth: int) -> str:
    parts = member.split("/")
    return parts[depth] if len(parts) > depth + 1 else ""


def _class_depth(images: Sequence[str]) -> int:
    tops = {member.split("/")[0] for member in images}
    wrapped = len(tops) == 1 and all(member.count("/") >= 2 for member in images)
    return 1 if wrapped else 0


def read_zip(candidates: Sequence[Candidate]) -> Iterator[Record]:
    """Read members by name; one open archive per file."""
    for container, members in group_by_container(candidates):
        try:
            file = open_file(container)
        except OSError as error:
            yield from (Record(c, None, f"cannot be read: {error}") for c in members)
            continue
        with file, zipfile.ZipFile(file) as archive:
            for candidate in members:
                yield _read_member(archive, candidate)


def _read_member(archive: zipfile.ZipFile, candidate: Candidate) -> Record:
    try:
        if archive.getinfo(candidate.member).flag_bits & ENCRYPTED_FLAG:
            return Record(candidate, None, "zip member cannot be read: it is encrypted")
        return Record(candidate, archive.read(candidate.member))
    except READ_ERRORS as error:
        return Record(candidate, None, f"zip member cannot be read: {error}")
