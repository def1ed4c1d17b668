"""Zip archives of images, with StyleGAN's `dataset.json` or `metadata.*` among them.

The directory of an archive is read once, while listing; a member is then a range of the file, also
on an object store. Old tools for Windows write backslashes between folders, and macOS writes UTF-8
without saying so; both are understood.
"""

import bz2
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from drorae.data.readers.candidates import (
    Candidate,
    Listing,
    Note,
    ReadRule,
    Record,
    file_name_bytes,
    is_image_name,
    joined,
    listed,
    printable,
)
from drorae.data.readers.damage import (
    MAX_IMAGE_BYTES,
    MAX_LABEL_BYTES,
    NESTED,
    NESTED_SUFFIXES,
    REPLACED,
    TOO_LONG,
    is_damage,
    is_hidden,
    note_of_hidden,
    reason_of,
)
from drorae.data.readers.filesystem import open_file
from drorae.data.readers.folder import is_candidate_name, sorted_out
from drorae.data.readers.labels import Stated, is_label_file, path_key, stated_by_files
from drorae.data.readers.ranges import Span, read_spans
from drorae.data.readers.tar_members import inside

READ_AHEAD_BYTES = 1 << 20

HEADER = struct.Struct("<4s5H3L2H")
"""Signature, version, flags, method, time, date, CRC, two sizes, lengths of name and extra field
(the format's section 4.3.7)."""

DESCRIPTOR = struct.Struct("<4sL")
"""Signature and CRC behind a member whose header was written before its content (4.3.9)."""

SIGNATURE, DESCRIPTOR_SIGNATURE = b"PK\x03\x04", b"PK\x07\x08"

END = struct.Struct("<4s4H")
"""Signature, numbers of two disks, members on this disk and in all, at the end (4.3.16)."""

END_SIGNATURE, END_BYTES, MANY = b"PK\x05\x06", 22 + 65535, 0xFFFF

NAME_BYTES = 4096
"""Room for the name and the extra field of a member, whose lengths only its header tells."""

ENCRYPTED_FLAG, DESCRIPTOR_FLAG, UTF8_FLAG = 0x1, 0x8, 0x800

SYMBOLIC_LINK = "is a symbolic link: pack the files themselves (zip without -y)"

METHODS: dict[int, Any] = {
    zipfile.ZIP_STORED: None,
    zipfile.ZIP_DEFLATED: lambda: zlib.decompressobj(-zlib.MAX_WBITS),
    zipfile.ZIP_BZIP2: bz2.BZ2Decompressor,
}
"""Compression methods that are read, and what reads them."""


class BadMember(Exception):
    """A member that cannot be read; the text is the reason."""


def list_zip(uri: str, name: str, rule: ReadRule) -> Listing:
    """List the images of one zip file.

    Args:
        uri: The zip file.
        name: Its name inside the source; keys start with it.
        rule: Where labels are.

    Returns:
        Images with the label that label files inside state; nothing is derived from folders.

    Raises:
        ValueError: A label file inside is damaged or too long.
        RuntimeError: An object store refused or did not answer.
    """
    labels: dict[str, bytes] = {}
    try:
        with open_file(uri, READ_AHEAD_BYTES) as file:
            num_stated = _stated_count(file)
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
                for info in infos:
                    path = _path(info)
                    if is_label_file(path) and not is_hidden(path):
                        labels[path] = _label_file(archive, info, uri)
    except _BadLabelFile as error:
        raise ValueError(str(error)) from error
    except Exception as error:
        if not is_damage(error, uri):
            raise
        reason = f"zip archive is damaged: {reason_of(error)}"
        return Listing(joined([]), [(printable(name), reason)])
    try:
        stated = stated_by_files(labels, rule)
    except ValueError as error:
        raise ValueError(f"in {uri!r}: {error}") from error
    found = _listing(uri, name, infos, stated)
    if num_stated not in (MANY, len(infos) & MANY):
        reason = f"zip archive is damaged: it states {num_stated} members and lists {len(infos)}"
        found.rejects.append((printable(name), reason))
    return found


class _BadLabelFile(Exception):
    """A label file that cannot be read."""


def _stated_count(file: Any) -> int:
    """Members that the end of an archive states, of more than 65,534 only that."""
    size_bytes = file.seek(0, 2)
    file.seek(max(0, size_bytes - END_BYTES))
    tail = file.read(END_BYTES)
    place = tail.rfind(END_SIGNATURE)
    file.seek(0)
    if not 0 <= place <= len(tail) - END.size:
        return MANY  # zipfile says what is wrong
    return END.unpack_from(tail, place)[4]


def _label_file(archive: zipfile.ZipFile, info: zipfile.ZipInfo, uri: str) -> bytes:
    reason = f"it has {info.file_size} bytes, more than {MAX_LABEL_BYTES >> 20} MiB"
    try:
        if info.header_offset + info.compress_size > archive.start_dir:
            reason = "its stated length does not fit into the archive"
        elif info.file_size <= MAX_LABEL_BYTES:
            with archive.open(info) as file:
                return file.read(MAX_LABEL_BYTES)
    except Exception as error:
        encrypted = isinstance(error, RuntimeError) and info.flag_bits & ENCRYPTED_FLAG
        if not encrypted and not is_damage(error, uri):
            raise
        reason = reason_of(error)
    raise _BadLabelFile(
        f"label file {printable(info.filename)!r} in {uri!r} cannot be read ({reason}): expected "
        "what states the labels of the images. Correct it, or take it out of the archive."
    )


def _raw_name(info: zipfile.ZipInfo) -> bytes:
    return info.orig_filename.encode("utf-8" if info.flag_bits & UTF8_FLAG else "cp437")


def _path(info: zipfile.ZipInfo) -> str:
    """Path of a member as its tool meant it; backslashes stay."""
    try:
        written = _raw_name(info).decode()
    except UnicodeDecodeError:
        written = info.orig_filename
    return inside(written, is_member=True) or ""


def _is_utf_8(info: zipfile.ZipInfo) -> bool:
    try:
        _raw_name(info).decode()
    except UnicodeDecodeError:
        return False
    return True


def _note_of_encoding(paths: Sequence[str]) -> tuple[Note, ...]:
    """Names whose encoding no one states, as archives made on Windows in Asia have them."""
    if not paths:
        return ()
    text = f"{len(paths)} names are not in UTF-8 and are read in code page 437, such as {paths[0]}:"
    text += " classes may be written otherwise than they were meant"
    return (Note(printable(text), is_doubtful=True),)


def _listing(uri: str, name: str, infos: Sequence[zipfile.ZipInfo], stated: Stated) -> Listing:
    members: dict[str, tuple[str, zipfile.ZipInfo]] = {}
    rejects: list[tuple[str, str]] = []
    names: list[str] = []
    num_hidden = 0
    for info in infos:
        path = _path(info)
        unix = path.replace("\\", "/")
        if info.filename.endswith(("/", "\\")):
            continue
        if not path:
            rejects.append(("", "a member without a name"))
            continue
        if is_hidden(unix):
            num_hidden += is_image_name(unix)
            continue
        names.append(unix)
        if is_candidate_name(unix):
            if unix in members:
                rejects.append((members.pop(unix)[0], REPLACED))
            members[unix] = (path, info)
        elif unix.lower().endswith(NESTED_SUFFIXES) and not is_label_file(unix):
            rejects.append((path, NESTED))
    rows: list[tuple[str, str, zipfile.ZipInfo]] = []
    for path, info in members.values():
        reason = _refusal(path, info, stated)
        if reason:
            rejects.append((path, reason))
        else:
            rows.append((path, stated.label_of.get(path_key(path), ""), info))
    absent = stated.absent(members) if stated.decides else ()
    not_nested = sorted(n for n in names if not n.lower().endswith(NESTED_SUFFIXES))
    _, no_images, notes = sorted_out(not_nested)
    return Listing(
        table=listed(
            "zip",
            uri,
            keys=[printable(f"{name}/{path}") for path, _, _ in rows],
            class_names=[label for _, label, _ in rows],
            index=[info.header_offset for _, _, info in rows],
            size_bytes=[info.compress_size for _, _, info in rows],
            member=[_raw_name(info).decode("utf-8", "surrogateescape") for _, _, info in rows],
        ),
        rejects=[(printable(f"{name}/{path}"), reason) for path, reason in [*rejects, *no_images]],
        notes=(
            *stated.notes,
            *absent,
            *notes,
            *note_of_hidden(num_hidden),
            *_note_of_encoding([path for path, _, info in rows if not _is_utf_8(info)]),
        ),
        has_stated_labels=stated.decides,
    )


def _refusal(path: str, info: zipfile.ZipInfo, stated: Stated) -> str:
    """Why a member is no row; empty if it is one."""
    if stat.S_ISLNK(info.external_attr >> 16):
        return SYMBOLIC_LINK
    if max(info.compress_size, info.file_size) > MAX_IMAGE_BYTES:
        return TOO_LONG
    if info.header_offset < 0:
        return "the archive does not hold it"
    reason = stated.rejects.get(path_key(path), "")
    return f"has no label: {reason}" if reason else ""


def read_zip(candidates: Sequence[Candidate]) -> Iterator[Record]:
    """Read members by offset; neighbours are read together."""
    contents = read_spans(
        [
            Span(c.container, c.index, HEADER.size + NAME_BYTES + c.size_bytes, may_end_early=True)
            for c in candidates
        ]
    )
    for candidate, data in zip(candidates, contents, strict=True):
        try:
            yield Record(candidate, _content(data, candidate))
        except BadMember as reason:
            yield Record(candidate, None, f"zip member cannot be read: {reason}")


def _content(data: bytes | OSError, candidate: Candidate) -> bytes:
    """Content of the member whose header is at the start of `data`, checked by its CRC."""
    if isinstance(data, OSError):
        raise BadMember(data.strerror or str(data))
    if len(data) < HEADER.size or not data.startswith(SIGNATURE):
        raise BadMember("its header is damaged")
    _, _, flags, method, _, _, crc, _, _, name_bytes, extra_bytes = HEADER.unpack_from(data)
    name = data[HEADER.size : HEADER.size + name_bytes]
    start = HEADER.size + name_bytes + extra_bytes
    size_bytes = candidate.size_bytes
    if name != file_name_bytes(candidate.member):
        raise BadMember("its name differs between the directory and its header")
    if flags & ENCRYPTED_FLAG:
        raise BadMember("it is encrypted")
    if method not in METHODS:
        raise BadMember(f"compression method {method} is none of {sorted(METHODS)}")
    packed = data[start : start + size_bytes]
    if len(packed) < size_bytes:
        raise BadMember("the archive ends early")
    if flags & DESCRIPTOR_FLAG and start + size_bytes + DESCRIPTOR.size <= len(data):
        sign, crc = DESCRIPTOR.unpack_from(data, start + size_bytes)
        crc = crc if sign == DESCRIPTOR_SIGNATURE else int.from_bytes(sign, "little")
    content = _unpacked(packed, method)
    if zlib.crc32(content) != crc:
        raise BadMember("its CRC does not match")
    return content


def _unpacked(packed: bytes, method: int) -> bytes:
    if not METHODS[method]:
        return packed
    unpacker = METHODS[method]()
    try:
        content = unpacker.decompress(packed, MAX_IMAGE_BYTES)
    except (zlib.error, OSError, ValueError) as error:
        raise BadMember(f"{type(error).__name__}: {error}") from error
    if not unpacker.eof:
        raise BadMember(TOO_LONG if len(content) == MAX_IMAGE_BYTES else "its content ends early")
    return content
