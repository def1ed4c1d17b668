"""Which members of a tar archive are images, and what labels stand beside them.

Grouping as webdataset has it (its `base_plus_ext`): a sample is a name up to the first dot of its
last part, what follows is the extension, upper case or not. `N.jpg`, `N.cls`, `N.mask.png` are one
sample with one image. Names with dots of their own (`photo.v1.jpg` beside `photo.v1.cls`) are
samples too. An archive without labels has no samples: every image is one.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from drorae.data.readers.candidates import Note, ReadRule, is_image_name, printable
from drorae.data.readers.labels import BadLabel, cell_label, decoded, label_text

LABEL_FIELDS = ("label", "cls", "class", "class_name")
"""Fields of the JSON beside an image that may give its class, the first stated one does."""

LABEL_EXTENSIONS = ("cls", "json")
"""Members that may give the class of an image, the first one does."""


NO_IMAGE = "not an image by its name; shard.image_key names the extension of images"


@dataclass(frozen=True, slots=True)
class Label:
    """A stated label."""

    text: str
    """Class name; empty if it is none."""
    reason: str = ""
    """Why it is none."""


@dataclass(slots=True)
class Picked:
    """Images of one archive."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    """Name of each image and its stated label, which may be empty."""
    rejects: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason)."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Members that look like images but are others of a sample, by extension."""
    num_doubtful: Counter[str] = field(default_factory=Counter)
    """How often something was guessed, by what."""
    label_extensions: set[str] = field(default_factory=set)
    """Last parts of the names of members that state labels."""
    has_stated_labels: bool = False
    """Whether any label stands beside an image."""


def split_name(name: str) -> tuple[str, str]:
    """Sample and extension (lower case) of a member."""
    folder, sign, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{sign}{stem}", extension.lower()


def is_image_member(name: str, rule: ReadRule) -> bool:
    """Whether a member looks like an image, or is what `rule.image_key` names."""
    return is_image_name(name) or (
        rule.image_key is not None and split_name(name)[1] == _plain(rule.image_key)
    )


def is_label_member(name: str, rule: ReadRule) -> bool:
    """Whether a member may hold the label of an image."""
    extension = f".{split_name(name)[1]}"
    return any(extension.endswith(f".{key}") for key in _label_extensions(rule))


def _plain(key: str) -> str:
    return key.removeprefix(".").lower()


def _label_extensions(rule: ReadRule) -> tuple[str, ...]:
    if rule.label_key is None:
        return LABEL_EXTENSIONS
    return tuple(dict.fromkeys((_plain(rule.label_key), "json")))


def member_label(name: str, data: bytes, rule: ReadRule) -> Label | None:
    """Label that the content of a member states; none if it does not speak of labels."""
    try:
        text = decoded(data)
        if not name.lower().endswith(".json"):
            return Label(cell_label(text))
        value = json.loads(text)
        if not isinstance(value, dict):
            return Label(label_text(value))
        return _first_stated(_fields(value, rule))
    except BadLabel as error:
        return Label("", str(error))
    except (ValueError, RecursionError) as error:
        return Label("", printable(f"{name} is damaged: {error}"))


def _fields(content: dict[str, Any], rule: ReadRule) -> list[Any]:
    """Values of the label fields that are there."""
    if rule.label_key is None or _plain(rule.label_key) == "json":
        return [content[key] for key in LABEL_FIELDS if key in content]
    value: Any = content
    for key in () if rule.label_key in content else rule.label_key.split("."):
        if not isinstance(value, dict) or key not in value:
            return []
        value = value[key]
    return [content[rule.label_key]] if value is content else [value]


def _first_stated(values: Sequence[Any]) -> Label | None:
    for value in values:
        text = cell_label(value) if isinstance(value, str) else label_text(value)
        if text:
            return Label(text)
    return Label("") if values else None


def pick_images(
    images: Sequence[str], unknown: Sequence[str], labels: Mapping[str, Label], rule: ReadRule
) -> tuple[Picked, list[Note]]:
    """Choose the image of each sample.

    Args:
        images: Names of all members that look like images, in the order of the archive.
        unknown: Names of members that may be images, of which their names say nothing.
        labels: Label by the name of the member that states it.
        rule: Its keys of image and label.

    Returns:
        The images, and notes of what was decided. Every image is a row, a reject or left out.
    """
    stated = _by_extension(labels)
    unused = set(stated)
    picked = Picked(has_stated_labels=rule.label_key is not None)
    for image in images:
        names = _label_names(image, stated, rule)
        unused.difference_update(names)
        if names and (stated[names[0]].text or stated[names[0]].reason):
            picked.has_stated_labels = True
            picked.label_extensions.add(names[0].rpartition(".")[2])
    if not picked.has_stated_labels and rule.image_key is None:
        picked.rows = [(name, "") for name in (*images, *unknown)]
    else:
        _leave_out(unknown, {_sample(name) for name in images} if unknown else set(), picked)
        for _, members in groupby(sorted(images, key=_sample), key=_sample):
            for name in _images_of_sample(list(members), stated, rule, picked):
                _add_row(name, _label_names(name, stated, rule), stated, picked)
    return picked, list(_notes(images, stated, unused, picked, rule))


def _leave_out(unknown: Sequence[str], samples: set[str], picked: Picked) -> None:
    """What is no image for sure is a part of the sample of an image, or a reject."""
    for name in unknown:
        if _sample(name) in samples:
            picked.left_out[split_name(name)[1]] += 1
        else:
            picked.rejects.append((name, NO_IMAGE))


def _sample(name: str) -> str:
    return split_name(name)[0]


def _is_dotted(name: str) -> bool:
    return "." in split_name(name)[1]


def _by_extension(labels: Mapping[str, Label]) -> dict[str, Label]:
    """Labels by sample, dot and extension in lower case."""
    result: dict[str, Label] = {}
    for name, label in labels.items():
        key = ".".join(split_name(name))
        key = name if key == name else key  # one text, not two equal ones
        before = result.setdefault(key, label)
        if before != label:
            result[key] = Label("", f"two members {key} that differ")
    return result


def _label_names(image: str, labels: Mapping[str, Label], rule: ReadRule) -> list[str]:
    """Members that may label an image; the first one counts.

    The name closest to the image's comes first, and labels before members that state none.
    """
    sample, extension = split_name(image)
    own = f"{sample}.{extension.rpartition('.')[0]}"
    prefixes = (own, sample) if "." in extension else (sample,)
    names = [f"{prefix}.{key}" for prefix in prefixes for key in _label_extensions(rule)]
    names = [name for name in names if name in labels]
    return sorted(names, key=lambda name: not (labels[name].text or labels[name].reason))


def _has_own_label(image: str, labels: Mapping[str, Label], rule: ReadRule) -> bool:
    """Whether a label has the name of an image with dots: its sample is its own."""
    own = image.rpartition(".")[0].lower()
    return _is_dotted(image) and any(
        name.lower().startswith(f"{own}.") for name in _label_names(image, labels, rule)
    )


def _images_of_sample(
    names: list[str], labels: Mapping[str, Label], rule: ReadRule, picked: Picked
) -> list[str]:
    """The images among the members of one sample; the others become rejects or are left out."""
    if rule.image_key is not None:
        wanted = [name for name in names if split_name(name)[1] == _plain(rule.image_key)]
        if not wanted:
            reason = f"its sample has no member .{_plain(rule.image_key)} (shard.image_key)"
            picked.rejects += [(name, reason) for name in names]
            return []
        return _first(wanted, [name for name in names if name not in wanted], picked)
    own = [name for name in names if _has_own_label(name, labels, rule)]
    rest = [name for name in names if name not in own]
    plain = [name for name in rest if not _is_dotted(name)]
    if plain:
        return own + _first(plain, [name for name in rest if name not in plain], picked)
    if own or len(rest) <= 1:
        picked.num_doubtful["dotted"] += len(rest) if not own else 0
        return own + rest
    reason = "one of several images of its sample: shard.image_key names the one to take"
    picked.rejects += [(name, reason) for name in rest]
    return []


def _first(images: list[str], others: list[str], picked: Picked) -> list[str]:
    """The first image; more of the same rank are rejects, the others are no images."""
    reason = f"its sample has the image {images[0]} too: shard.image_key names the one to take"
    picked.rejects += [(name, printable(reason)) for name in images[1:]]
    picked.num_doubtful["several"] += len(images) > 1
    picked.left_out.update(split_name(name)[1] for name in others)
    return images[:1]


def _add_row(
    name: str, label_names: Sequence[str], labels: Mapping[str, Label], picked: Picked
) -> None:
    label = labels[label_names[0]] if label_names else Label("")
    if label.reason:
        picked.rejects.append((name, f"has no label: {label.reason}"))
    else:
        picked.rows.append((name, label.text))


def _notes(
    images: Sequence[str],
    labels: Mapping[str, Label],
    unused: set[str],
    picked: Picked,
    rule: ReadRule,
) -> Iterator[Note]:
    if picked.has_stated_labels:
        yield _note_of_labels(picked, rule)
    elif labels:
        yield Note(
            f"{len(labels)} members .cls or .json state no label of an image: shard.label_key "
            "names the extension or the field of JSON that does",
            is_doubtful=True,
        )
    for extension, count in sorted(picked.left_out.items()):
        yield Note(f"{count} members .{extension} beside the image of their sample are no images")
    for kind, count in sorted(picked.num_doubtful.items()):
        if count:
            yield Note(f"{count} {DOUBTS[kind]}", is_doubtful=True)
    if picked.has_stated_labels and unused:
        text = f"{len(unused)} labels have no image beside them, such as {min(unused)}"
        yield Note(printable(text), is_doubtful=True)
    if not picked.has_stated_labels and rule.image_key is None:
        yield from _notes_of_dots(images)


DOUBTS = {
    "dotted": "samples have one image and its extension has several parts, it is taken for the "
    "image: shard.image_key names the extension of images",
    "several": "samples have several images, of which the first is taken: shard.image_key names "
    "the extension of images",
}
"""What is guessed, by the name under which it is counted."""


def _note_of_labels(picked: Picked, rule: ReadRule) -> Note:
    extensions = sorted(f".{extension}" for extension in picked.label_extensions)
    if not extensions:
        return Note(
            f"no label is stated by .{', .'.join(_label_extensions(rule))} beside the images: "
            "shard.label_key names the extension or the field of JSON that does",
            is_doubtful=True,
        )
    return Note(f"labels are the members {', '.join(extensions)} beside the images")


def _notes_of_dots(images: Sequence[str]) -> Iterator[Note]:
    dotted = [name for name in images if _is_dotted(name)]
    if not dotted:
        return
    plain = {_sample(name) for name in images if not _is_dotted(name)}
    others = [name for name in dotted if _sample(name) in plain]
    if others:
        yield Note(
            printable(
                f"{len(others)} images such as {others[0]} have the name of another image up to "
                "the first dot; all are images here: shard.image_key names the extension of images"
            ),
            is_doubtful=True,
        )
