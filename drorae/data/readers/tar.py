"""Tar archives: class folders, or webdataset (`NAME.jpg` beside `NAME.cls` or `NAME.json`).

Listing reads headers and the small label members; images are read later by offset, also from an
object store. Compressed tar files allow no random access and are refused. `tar_members` says what
an archive holds, `webdataset` which of it are images with what label.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from drorae.data.readers.candidates import (
    Candidate,
    Listing,
    Note,
    ReadRule,
    Record,
    listed,
    printable,
    with_values,
)
from drorae.data.readers.damage import (
    MAX_LABEL_BYTES,
    NESTED,
    NESTED_SUFFIXES,
    REPLACED,
    is_damage,
    is_hidden,
    note_of_hidden,
    reason_of,
)
from drorae.data.readers.filesystem import open_file
from drorae.data.readers.folder import is_candidate_name
from drorae.data.readers.labels import Stated, is_label_file, path_key, stated_by_files
from drorae.data.readers.ranges import Span, read_spans
from drorae.data.readers.tar_members import (
    Entry,
    Link,
    Members,
    Place,
    expanded,
    followed,
    read_members,
    read_place,
)
from drorae.data.readers.webdataset import (
    Label,
    is_image_member,
    is_label_member,
    member_label,
    pick_images,
)

READ_AHEAD_BYTES = 8 << 20
"""Headers lie between the images: listing reads an archive from start to end."""

MAX_MEMBER_LABEL_BYTES = 16 << 20
"""Longest member that is read as the label of one image."""


def list_tar(uri: str, name: str, rule: ReadRule) -> Listing:
    """List the images of one tar file.

    Args:
        uri: The tar file.
        name: Its name inside the source; keys start with it.
        rule: Where images and labels are.

    Returns:
        Images with the label that is stated beside them; nothing is derived from folders.

    Raises:
        ValueError: A label file inside is damaged.
        RuntimeError: An object store refused or did not answer.
    """
    members, labels = Members(), {}
    files: dict[str, bytes] = {}
    try:
        with open_file(uri, READ_AHEAD_BYTES) as file:
            _read(file, uri, rule, members, labels, files)
    except Exception as error:
        if not is_damage(error, uri):
            raise
        members.damage = members.damage or f"cannot be read: {reason_of(error)}"
    try:
        stated = stated_by_files(files, rule)
    except ValueError as error:
        raise ValueError(f"in {uri!r}: {error}") from error
    found = _listing(uri, name, rule, members, labels)
    return _labelled(found, name, stated) if stated.decides else found


def _labelled(found: Listing, name: str, stated: Stated) -> Listing:
    """The listing with the labels of label files in the archive, unless members state others."""
    paths = [key.removeprefix(f"{printable(name)}/") for key in found.table["key"].to_pylist()]
    if found.has_stated_labels:
        text = "label files in the archive are not read, because members beside the images state"
        return replace(found, notes=(*found.notes, Note(f"{text} labels", is_doubtful=True)))
    keys = [path_key(path) for path in paths]
    codes = np.arange(len(keys))
    texts = [stated.label_of.get(key, "") for key in keys]
    found = replace(
        found,
        table=with_values(found.table, "class_name", codes, texts),
        notes=(*stated.notes, *stated.absent(paths), *found.notes),
        has_stated_labels=True,
    )
    is_bad = np.array([key in stated.rejects for key in keys], bool)
    rejects = [
        (f"{printable(name)}/{path}", f"has no label: {stated.rejects[key]}")
        for path, key in zip(paths, keys, strict=True)
        if key in stated.rejects
    ]
    found = replace(found, table=found.table.filter(pa.array(~is_bad)).combine_chunks())
    found.rejects.extend(rejects)
    return found


def _read(
    file: Any,
    uri: str,
    rule: ReadRule,
    members: Members,
    labels: dict[str, Label],
    files: dict[str, bytes],
) -> None:
    """Walk the archive; labels are read where they lie, those behind links afterwards."""
    same: dict[Label, Label] = {}

    def read_label(member: str, place: Place) -> None:
        labels.pop(member, None)
        if is_label_file(member) and not is_hidden(member) and place.size_bytes <= MAX_LABEL_BYTES:
            files[member] = read_place(file, place)
        elif is_label_member(member, rule) and not is_hidden(member):
            label = _label(file, member, place, rule)
            if label:
                labels[member] = same.setdefault(label, label)

    read_members(file, uri, read_label, members)
    for member, entry in members.entries.items():
        if not isinstance(entry, Place) and is_label_member(member, rule):
            labels.pop(member, None)
            place = followed(member, members.entries)
            if isinstance(place, Place):
                read_label(member, place)


def _label(file: Any, member: str, place: Place, rule: ReadRule) -> Label | None:
    if place.size_bytes > MAX_MEMBER_LABEL_BYTES:
        return Label("", f"{printable(member)} has {place.size_bytes} bytes")
    return member_label(member, read_place(file, place), rule)


def _listing(
    uri: str, name: str, rule: ReadRule, members: Members, labels: dict[str, Label]
) -> Listing:
    places: dict[str, Place] = {}
    images, unknown = [], []
    rejects: list[tuple[str, str]] = []
    hidden = 0
    for member, entry in members.entries.items():
        is_image = is_image_member(member, rule)
        if is_hidden(member):
            hidden += is_image
        elif member.lower().endswith(NESTED_SUFFIXES):
            rejects.append((member, NESTED))
        elif is_image or is_candidate_name(member):
            place = followed(member, members.entries)
            if isinstance(place, Place):
                places[member] = place
                (images if is_image else unknown).append(member)
            elif is_image or isinstance(entry, Link):
                rejects.append((member, _why_not(entry, place)))
    # What an image links to is no other image.
    starts = {places[member].start for member in images} if unknown else set()
    unknown = [member for member in unknown if places[member].start not in starts]
    rejects += [(m, REPLACED) for m in members.replaced if is_image_member(m, rule)]
    picked, notes = pick_images(images, unknown, labels, rule)
    rejects = [(f"{name}/{member}", reason) for member, reason in rejects + picked.rejects]
    if members.damage:
        rejects.append((name, f"tar archive {members.damage}"))
    return Listing(
        table=_table(uri, name, picked.rows, places),
        rejects=[(printable(key), printable(reason)) for key, reason in rejects],
        notes=(*notes, *_notes(members, hidden)),
        has_stated_labels=picked.has_stated_labels,
    )


def _table(
    uri: str, name: str, rows: Sequence[tuple[str, str]], places: dict[str, Place]
) -> pa.Table:
    return listed(
        "tar",
        uri,
        keys=[printable(f"{name}/{member}") for member, _ in rows],
        class_names=[label for _, label in rows],
        index=[places[member].start for member, _ in rows],
        size_bytes=[places[member].size_bytes for member, _ in rows],
        member=[places[member].pieces for member, _ in rows],
    )


def _why_not(entry: Entry, target: Entry | None) -> str:
    """Why an entry is no file that can be read."""
    if not isinstance(entry, Link):
        return str(entry)
    if target is None:
        return f"link to {entry.text}, which is no file of the archive"
    return f"link to {entry.text}, which {target}"


def _notes(members: Members, num_hidden: int) -> Iterator[Note]:
    yield from note_of_hidden(num_hidden)
    if members.num_ends > 1:
        yield Note(f"tar archive is {members.num_ends} joined ones: all are read", True)
    if not members.num_ends and not members.damage:
        yield Note("tar archive has no end mark: it may be cut off", is_doubtful=True)


def tar_span(candidate: Candidate) -> Span | None:
    """Where the content of a member lies in its archive; none if it is sparse."""
    return None if candidate.member else _stored_span(candidate)


def _stored_span(candidate: Candidate) -> Span:
    return Span(candidate.container, candidate.index, candidate.size_bytes)


def read_tar(candidates: Sequence[Candidate]) -> Iterator[Record]:
    """Read members by offset; neighbours are read together."""
    contents = read_spans([_stored_span(candidate) for candidate in candidates])
    for candidate, data in zip(candidates, contents, strict=True):
        if not isinstance(data, OSError):
            yield Record(candidate, expanded(data, candidate.member))
        elif data.errno is None:
            yield Record(candidate, None, f"truncated archive: {data}")
        else:
            yield Record(candidate, None, f"cannot be read: {data.strerror}")
