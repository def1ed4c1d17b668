"""The same pictures in six usual layouts give the same labels and pixels, by the README's commands.

Among them are the odd files of ImageNet: a CMYK JPEG, a PNG named .JPEG, a picture that Exif turns,
a gray one.
"""

import csv
import hashlib
import io
import json
import re
import shlex
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fakes import encoded, pixels, shard_output
from PIL import Image

from drorae.data.decoding import decode_png
from drorae.store.workspace import StageOutput
from pipelines import cli
from pipelines.inspect_command import configuration_of
from pipelines.parser import build_parser

SYNSETS = ("n01440764", "n01443537", "n02085620")
README = Path(__file__).parents[3] / "README.md"


@dataclass(frozen=True)
class Photo:
    name: str
    label: int
    split: str
    data: bytes


def _encode(number: int) -> bytes:
    image = Image.fromarray(pixels(number, 40 + number, 33))
    if number == 0:
        return encoded(image.convert("CMYK"), "JPEG")
    if number == 1:
        return encoded(image, "PNG")  # named .JPEG
    if number == 2:
        turned = Image.Exif()
        turned[0x0112] = 6
        return encoded(image, "JPEG", exif=turned)
    if number == 3:
        return encoded(image.convert("L"), "JPEG")
    return encoded(image, "JPEG")


@pytest.fixture(scope="module")
def photos() -> list[Photo]:
    """Nine for training, three for validation; three classes."""
    found = []
    for number in range(12):
        label, split = number % 3, "train" if number < 9 else "val"
        stem = f"{SYNSETS[label]}_{number}" if split == "train" else f"ILSVRC2012_val_{number:08d}"
        found.append(Photo(f"{stem}.JPEG", label, split, _encode(number)))
    return found


def _write(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def imagenet(root: Path, photos: list[Photo]) -> None:
    lines = []
    for photo in photos:
        synset = SYNSETS[photo.label]
        if photo.split == "train":
            _write(root / "train" / synset / photo.name, photo.data)
        else:
            _write(root / "val" / photo.name, photo.data)
            lines.append([photo.name.removesuffix(".JPEG"), f"{synset} 1 2 30 40"])
    text = io.StringIO()
    csv.writer(text).writerows([["ImageId", "PredictionString"], *lines])
    _write(root / "LOC_val_solution.csv", text.getvalue())


def hub(root: Path, photos: list[Photo]) -> None:
    feature = {"names": list(SYNSETS), "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": feature}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for split, name in (("train", "train"), ("val", "validation")):
        rows = [photo for photo in photos if photo.split == split]
        for part in range(2):
            mine = rows[part::2]
            images = [{"bytes": photo.data, "path": photo.name} for photo in mine]
            table = pa.table({"image": images, "label": [photo.label for photo in mine]})
            path = root / "data" / f"{name}-{part:05d}-of-00002.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table.replace_schema_metadata(metadata), path)


def webdataset(root: Path, photos: list[Photo]) -> None:
    root.mkdir()
    for split in ("train", "val"):
        rows = [photo for photo in photos if photo.split == split]
        for part in range(2):
            with tarfile.open(root / f"{split}-{part:06d}.tar", "w") as archive:
                for photo in rows[part::2]:
                    stem = photo.name.removesuffix(".JPEG")
                    _add(archive, f"{stem}.jpg", photo.data)
                    _add(archive, f"{stem}.cls", SYNSETS[photo.label].encode())


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def stylegan(root: Path, photos: list[Photo]) -> None:
    root.mkdir()
    for split in ("train", "val"):
        labels = []
        with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
            for number, photo in enumerate(photo for photo in photos if photo.split == split):
                name = f"00000/img{number:08d}.jpg"
                archive.writestr(name, photo.data)
                labels.append([name, photo.label])
            archive.writestr("dataset.json", json.dumps({"labels": labels}))


def hugging_face_folder(root: Path, photos: list[Photo]) -> None:
    for split, name in (("train", "train"), ("val", "validation")):
        lines = []
        for photo in photos:
            if photo.split == split:
                _write(root / name / photo.name, photo.data)
                row = {"file_name": photo.name, "label": SYNSETS[photo.label]}
                lines.append(f"{json.dumps(row)}\n")
        _write(root / name / "metadata.jsonl", "".join(lines))


def class_folders(root: Path, photos: list[Photo]) -> None:
    for photo in photos:
        _write(root / SYNSETS[photo.label] / photo.name, photo.data)


LAYOUTS: dict[str, Callable[[Path, list[Photo]], None]] = {
    "imagenet": imagenet,
    "hub": hub,
    "webdataset": webdataset,
    "stylegan": stylegan,
    "imagefolder": hugging_face_folder,
    "photos": class_folders,
}
"""Layouts by the first folder of their command in the README."""


def commands() -> dict[str, list[str]]:
    """Words of the README's commands behind `drorae`, by the first folder of the source."""
    lines = re.findall(r"^    drorae (inspect \w.*?)(?:  +#.*)?$", README.read_text(), re.MULTILINE)
    found = [shlex.split(line) for line in lines]
    return {words[1].split("/")[0]: words for words in found}


def content(output: StageOutput) -> dict[str, set[tuple[int, str]]]:
    """Label and digest of the pixels of every picture, by split."""
    found: dict[str, set[tuple[int, str]]] = {}
    for split in ("train", "val"):
        names = output.names(f"{split}/part-", ".arrow")
        tables = [pa.ipc.open_file(pa.memory_map(str(output.local(n)))).read_all() for n in names]
        rows = [row for table in tables for row in table.to_pylist()]
        digests = [hashlib.sha256(decode_png(row["image"]).tobytes()).hexdigest() for row in rows]
        pairs = zip(rows, digests, strict=True)
        found[split] = {(row["label"], digest) for row, digest in pairs}
    return found


@pytest.fixture(scope="module")
def expected(photos: list[Photo], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What shards of the class folders of each split hold."""
    root = tmp_path_factory.mktemp("expected")
    for split in ("train", "val"):
        class_folders(root / split, [photo for photo in photos if photo.split == split])
    options = build_parser().parse_args(
        ["inspect", str(root / "train"), "--val-source", str(root / "val")]
    )
    return content(shard_output(root, replace(configuration_of(options).shard, resolution_px=32)))


def test_the_readme_has_a_command_for_each_layout() -> None:
    assert set(LAYOUTS) <= set(commands())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_command_gives_the_same_labels_and_pixels(
    layout: str,
    photos: list[Photo],
    expected: dict[str, set[tuple[int, str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    LAYOUTS[layout](tmp_path / layout, photos)
    words = commands()[layout]
    if layout == "photos":  # 2 % of twelve pictures are none
        words = [*words, "--set", "shard.val_fraction=0.3"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    options = build_parser().parse_args([*words, "--set", "shard.resolution_px=32"])
    output = shard_output(tmp_path / "out", configuration_of(options).shard)
    shards, counts = content(output), output.read_json("counts.json")
    # StyleGAN's labels are numbers without names.
    names = ["0", "1", "2"] if layout == "stylegan" else list(SYNSETS)
    assert counts["class_names"] == found["class_names"] == names
    assert counts["rejected"] == 0
    if layout == "photos":  # the split is by hash
        assert shards["train"] | shards["val"] == expected["train"] | expected["val"]
    else:
        assert shards == expected
    assert not any(note["is_doubtful"] for note in found["notes"])
    assert found["sample"]["modes"] == {"RGB": 10, "CMYK": 1, "L": 1}
    assert found["sample"]["turned"] == 1
    for split in found["splits"]:
        assert list(split["class_rows"]) == counts[split["name"]]["class_rows"]
