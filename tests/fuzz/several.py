"""Folders of containers: shards of one set, a tar for each class, strays beside them."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.fuzz.content import Row, Source
from tests.fuzz.draws import Draw, composed, different_names, picture


def build(draw: Draw, folder: Path) -> Source:
    """A folder of two or three containers of one kind."""
    source = Source(folder / different_names(draw, 1)[0])
    source.path.mkdir()
    draw.pick((_tables, _tables, _samples, _tar_per_class, _class_folders))(draw, source)
    if draw.chance(0.3):
        (source.path / "README.md").write_text("# a set")
        source.rejects["README.md"] += 1
    if draw.chance(0.3):
        (source.path / "logo.png").write_bytes(picture(99))
        source.rejects["logo.png"] += 1
    return source


def _tables(draw: Draw, source: Source) -> None:
    """Parquet shards whose lists of names may differ; some cells name no class."""
    stated = [composed(name) for name in different_names(draw, 4)]
    lists: list[list[str]] = []
    same = draw.chance(0.5)
    for shard in range(draw.number(2, 3)):
        names = stated if same else draw.some(stated, draw.number(2, 4))
        lists.append(names)
        cells = [draw.number(0, len(names) - 1) for _ in range(draw.number(4, 6))]
        cells += [-1] if draw.chance(0.3) else []
        path = source.path / f"part-{shard:05d}.parquet"
        for row, cell in enumerate(cells):
            key = f"{path.name}/{row:08d}"
            if cell < 0:
                source.rejects[key] += 1
            else:
                source.rows[key] = Row(names[cell], picture(10 * shard + row))
        _write_table(path, names, cells, [picture(10 * shard + row) for row in range(len(cells))])
    source.class_names = tuple(lists[0])
    if any(names != lists[0] for names in lists):
        source.class_names = tuple(sorted({name for names in lists for name in names}))


def _write_table(
    path: Path, names: Sequence[str], cells: Sequence[int], pictures: Sequence[bytes]
) -> None:
    features = {"label": {"names": list(names), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"image": list(pictures), "label": list(cells)})
    pq.write_table(table.replace_schema_metadata(metadata), path)


def _samples(draw: Draw, source: Source) -> None:
    """Webdataset shards, whose samples have equal names."""
    classes = ["0", "2", "10"]
    for shard in range(draw.number(2, 3)):
        members = []
        path = source.path / f"set-{shard:06d}.tar"
        for number in range(draw.number(4, 6)):
            label, data = draw.pick(classes), picture(10 * shard + number)
            members += [(f"{number:04d}.png", data), (f"{number:04d}.cls", label.encode())]
            source.rows[f"{path.name}/{number:04d}.png"] = Row(label, data)
        _write_tar(path, members)


def _tar_per_class(draw: Draw, source: Source) -> None:
    """As ImageNet's own archive: a flat tar named as its class."""
    for place, name in enumerate(draw.some(("n01440764", "n01443537", "n02084071", "cat"), 3)):
        path = source.path / f"{name}.tar"
        members = [(f"{i}.png", picture(10 * place + i)) for i in range(draw.number(2, 4))]
        for member, data in members:
            source.rows[f"{path.name}/{member}"] = Row(name, data)
        _write_tar(path, members)


def _class_folders(draw: Draw, source: Source) -> None:
    """Shards of class folders, read by one rule though a shard may lack a class."""
    classes = different_names(draw, 3)
    for shard in range(2):
        path = source.path / f"{shard}.tar"
        members = []
        for number in range(draw.number(4, 6)):
            class_name = classes[number % 3] if not shard else draw.pick(classes[:2])
            name, data = f"{class_name}/{number}.png", picture(10 * shard + number)
            members.append((name, data))
            source.rows[f"{path.name}/{name}"] = Row(composed(class_name), data)
        _write_tar(path, members)


def _write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
