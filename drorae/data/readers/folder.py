"""The files of a folder: which are images, and what label files among them state.

The key is the relative path, so equal file names in two classes never clash. A file whose name says
nothing (no suffix, or an unknown one) is a candidate; decoding it decides.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from posixpath import splitext

from drorae.data.readers.archives import CONTAINER_SUFFIXES
from drorae.data.readers.candidates import (
    Candidate,
    Listing,
    Note,
    ReadRule,
    Record,
    is_image_name,
    listed,
    printable,
)
from drorae.data.readers.filesystem import read_content
from drorae.data.readers.labels import Stated, is_label_file, path_key, stated_by_files
from drorae.data.readers.ranges import Span, read_spans

COMPANION_SUFFIXES = frozenset({".txt", ".json", ".cls", ".xml", ".csv", ".caption"})
"""Of files that lie beside an image of the same name and say something of it."""

OTHER_NAMES = """
.md .rst .tex .bib .html .htm .pdf .doc .docx .odt .ppt .pptx .xls .xlsx .log .lock .url .lnk .sql
.jsonl .tsv .yaml .yml .toml .ini .cfg .sh .bat .py .ipynb .pyc .c .cpp .h .js .css .exe .dll .so
.npy .npz .pkl .pickle .pt .pth .ckpt .safetensors .onnx .mat .h5 .hdf5 .lmdb .mdb .db .sqlite .bin
.arrow .feather .tfrecord .idx .crc .md5 .sha1 .sha256 .asc .sig .torrent .bak .tmp .part .swp
.mp4 .avi .mov .mkv .webm .m4v .mpg .mpeg .mp3 .wav .flac .ogg .m4a .svg
"""
OTHER_SUFFIXES = COMPANION_SUFFIXES | frozenset(OTHER_NAMES.split())
"""Of files that are known not to be images."""

ARCHIVE_SUFFIXES = frozenset({".rar", ".7z", ".gz", ".bz2", ".xz", ".zst", ".lz4"})
"""Of archives that are not read."""

SPARK_FILES = frozenset({"_SUCCESS", "_metadata", "_common_metadata"})
"""What Spark writes beside the parts of a table."""

NO_IMAGE = "not an image by its name"
PACKED = "an archive of a kind that is not read: unpack it, or pack it as .tar or .zip"


def is_candidate_name(name: str) -> bool:
    """Whether a file may be an image: its name says so, or says nothing."""
    if is_image_name(name):
        return True
    suffix = splitext(name)[1].lower()
    known = suffix in OTHER_SUFFIXES or suffix in ARCHIVE_SUFFIXES
    return not (known or is_container_name(name) or is_label_file(name))


def is_container_name(name: str) -> bool:
    """Whether a file holds images by its name."""
    return name.lower().endswith(CONTAINER_SUFFIXES)


def list_folder(uri: str, names: Sequence[str], rule: ReadRule) -> Listing:
    """List the images among the relative file names of a folder.

    Class names are those that label files state; what folders say is left to `assembling`.

    Args:
        uri: The folder.
        names: Relative names, sorted, without containers.
        rule: How labels are found.

    Raises:
        ValueError: A label file is damaged.
    """
    root = uri.rstrip("/")
    files = {name: read_content(f"{root}/{name}") for name in names if is_label_file(name)}
    try:
        stated = stated_by_files(files, rule)
    except ValueError as error:
        raise ValueError(f"in {uri!r}: {error}") from error
    candidates, rejects, notes = sorted_out(names)
    bad = {name for name in candidates if stated.rejects and path_key(name) in stated.rejects}
    images = [name for name in candidates if name not in bad]
    table = listed(
        "file",
        root,
        keys=[printable(name) for name in images],
        class_names=[_stated(stated, name) for name in images],
        member=images,
    )
    return Listing(
        table,
        [*rejects, *((printable(name), stated.rejects[path_key(name)]) for name in sorted(bad))],
        notes=(*stated.notes, *stated.absent(candidates), *notes),
        has_stated_labels=stated.decides,
    )


def _stated(stated: Stated, name: str) -> str:
    return stated.label_of.get(path_key(name), "") if stated.decides else ""


def sorted_out(names: Sequence[str]) -> tuple[list[str], list[tuple[str, str]], list[Note]]:
    """Candidates, rejects by name, and a note of what belongs to images and is left out.

    Args:
        names: Relative names, sorted. Containers among them are none of these.
    """
    candidates: list[str] = []
    rejects: list[tuple[str, str]] = []
    left_out: Counter[str] = Counter()
    for name in names:
        suffix = splitext(name)[1].lower()
        if is_candidate_name(name):
            candidates.append(name)
        elif is_label_file(name):
            left_out[name.rpartition("/")[2]] += 1
        elif suffix in COMPANION_SUFFIXES and _has_image(splitext(name)[0], names):
            left_out[suffix] += 1
        elif not is_container_name(name):
            rejects.append((printable(name), PACKED if suffix in ARCHIVE_SUFFIXES else NO_IMAGE))
    if not left_out:
        return candidates, rejects, []
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
    return candidates, rejects, [Note(f"files beside images are no images: {told}")]


def _has_image(stem: str, names: Sequence[str]) -> bool:
    """Whether an image is called so but for its suffix."""
    place = bisect_left(names, f"{stem}.")
    while place < len(names) and names[place].startswith(f"{stem}."):
        if splitext(names[place])[0] == stem and is_image_name(names[place]):
            return True
        place += 1
    return False


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
