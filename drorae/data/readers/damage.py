"""What readers of containers refuse, and what failures inside them mean.

A failure is damage of a file, which is a reject, or a store that does not answer: that says nothing
of the images and ends the stage.
"""

import errno
import struct
import tarfile
import zipfile
import zlib

import pyarrow as pa

from drorae.data.readers.candidates import Note, is_hidden_name, printable
from drorae.data.readers.filesystem import is_remote

MAX_IMAGE_BYTES = 1 << 30
"""Files of this length or more are no pictures: they are not read into memory."""

MAX_LABEL_BYTES = 1 << 30
"""Longest label file that is read: the one of ImageNet has 50 MB."""

TOO_LONG = f"is longer than {MAX_IMAGE_BYTES >> 20} MiB, which no picture is"

REASON_CHARACTERS = 200
"""Parsers quote what they cannot read, sometimes all of it."""

REPLACED = "replaced by a later member of the same name"

NESTED_SUFFIXES = (".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar", ".parquet")
"""Members of archives that may hold images and are not opened."""

NESTED = "is an archive inside an archive: unpack it, and give shard.source the folder"

_OF_CONTENT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
    pa.ArrowException,
    struct.error,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What parsers raise on damaged input, whatever they mean by it."""


_OF_MACHINE = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN}
)
"""Too many open files, a network file system that went away, and the like."""


def is_of_machine(error: BaseException) -> bool:
    """Whether a failure says that this machine is in trouble, and nothing of the file."""
    return isinstance(error, OSError) and error.errno in _OF_MACHINE


def is_damage(error: Exception, uri: str) -> bool:
    """Whether a failure while a file was read is about its content; else it is to be raised.

    Args:
        error: The failure.
        uri: The file. A local one that cannot be read is damaged too.
    """
    if is_of_machine(error):
        return False
    if not is_remote(uri) or isinstance(error, _OF_CONTENT):
        return True
    # pyarrow reports damaged pages so; errors of a store have a class or a number.
    return type(error) is OSError and error.errno is None


def reason_of(error: Exception) -> str:
    """A failure in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return printable(" ".join(str(text).split()))[:REASON_CHARACTERS]


def is_hidden(path: str) -> bool:
    """Whether a member or a folder around it is hidden."""
    return any(map(is_hidden_name, path.split("/")))


def note_of_hidden(count: int) -> tuple[Note, ...]:
    """What is said of hidden images, if there are any."""
    return (Note(f"{count} hidden images are left out"),) if count else ()
