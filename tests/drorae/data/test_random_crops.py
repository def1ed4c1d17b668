from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from data_fakes import encoded, job, pixels, shard_output
from PIL import Image
from torchvision import transforms

from drorae.data.decoding import to_square, to_view
from drorae.data.draws import host_uniform
from drorae.data.images import ImageShards
from drorae.data.jobs import ShardJob
from drorae.data.loaders import crop_batches
from drorae.data.random_crops import RandomCrops, crop_corner

SIZES = [(60, 41), (33, 50), (24, 24), (18, 30), (20, 17), (19, 90), (40, 24), (24, 31)]
"""Widths and heights around a view of 24 px: larger, smaller, equal, long."""


def make_sizes(root: Path) -> Path:
    for number, (width, height) in enumerate(SIZES):
        folder = root / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:03d}.png").write_bytes(encoded(pixels(number, width, height)))
    return root


def source_image(row: dict) -> Image.Image:
    number = int(row["key"].split("/")[1][:3])
    return Image.fromarray(pixels(number, *SIZES[number]))


def rows(output, split: str) -> list[dict]:
    names = output.names(f"{split}/part-", ".arrow")
    tables = [pa.ipc.open_file(pa.memory_map(str(output.local(n)))).read_all() for n in names]
    return pa.concat_tables(tables).to_pylist()


@pytest.fixture
def output(tmp_path: Path):
    shard = job(make_sizes(tmp_path / "photos"), view_px=24, pictures="source", val_fraction=0.3)
    return shard_output(tmp_path, shard)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (300, 301), (1021, 389), (256, 256)])
@pytest.mark.parametrize("view_px", [384, 100])
def test_views_equal_those_of_torchvision(size: tuple[int, int], view_px: int):
    image = Image.fromarray(pixels(3, *size))
    resize = transforms.Resize(view_px, interpolation=transforms.InterpolationMode.BICUBIC)
    np.testing.assert_array_equal(np.asarray(to_view(image, view_px)), np.asarray(resize(image)))


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
def test_squares_made_at_load_are_adm_crops_of_the_source(output, keep_bytes: int):
    for split in ("train", "val"):
        shards = ImageShards(output, split, keep_bytes=keep_bytes)
        images, _ = shards.read(np.arange(len(shards)))
        for image, row in zip(images, rows(output, split), strict=True):
            square = np.asarray(to_square(source_image(row), 16, "center"))
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), square)


def test_a_crop_is_a_part_of_the_view_at_the_corner_that_is_drawn(output):
    crops = RandomCrops(output, seed=5)
    ids = np.array([2, 0, 3])
    images, labels = crops.read(ids, epoch=7)
    assert labels.tolist() == ImageShards(output, "train").labels[ids].tolist()
    stored = rows(output, "train")
    for image, number in zip(images, ids.tolist(), strict=True):
        view = np.asarray(to_view(source_image(stored[number]), 24))
        draw = host_uniform(5, "crop", 7, np.array([number]), 2)[0]
        left, top = crop_corner(draw, (view.shape[1], view.shape[0]), 16)
        expected = view[top : top + 16, left : left + 16]
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_crops_depend_on_seed_epoch_and_id_alone(output):
    ids = np.arange(len(RandomCrops(output, seed=0)))
    first = RandomCrops(output, seed=0).read(ids, 3)[0]
    backwards = RandomCrops(output, seed=0).read(ids[::-1], 3)[0].flip(0)
    assert (first == backwards).all()
    assert not (first == RandomCrops(output, seed=0).read(ids, 4)[0]).all()
    assert not (first == RandomCrops(output, seed=1).read(ids, 3)[0]).all()


def test_every_place_is_equally_likely_and_inside():
    draws = host_uniform(0, "crop", 1, np.arange(6000), 2)
    corners = [crop_corner(draw, (20, 18), 16) for draw in draws]
    for axis, places in ((0, 5), (1, 3)):
        counts = np.bincount([c[axis] for c in corners], minlength=places)
        # A binomial count of mean 6000 / places has a deviation below 37: five of them.
        assert len(counts) == places
        assert abs(counts - 6000 / places).max() < 185
    joint = np.corrcoef(np.array(corners).T)[0, 1]
    assert abs(joint) < 0.06  # left and top are independent
    assert {crop_corner(draw, (16, 16), 16) for draw in draws[:9]} == {(0, 0)}


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_batches_and_other_worker_counts_see_the_same_crops(output, world_size: int):
    crops = RandomCrops(output, seed=0)
    order = {"seed": 0, "num_steps": 6, "global_batch": 2}
    alone = list(crop_batches(crops, **order))
    for rank in range(world_size):
        part = {"rank": rank, "world_size": world_size, "start_step": 3}
        for batch in crop_batches(crops, **order, **part):
            whole = alone[batch.step]
            assert batch.hidden is None
            assert (batch.images == whole.images[batch.positions]).all()
            np.testing.assert_array_equal(batch.ids, whole.ids[batch.positions.numpy()])
    for batch in alone:
        epoch = batch.step // (len(crops) // 2)
        pixels_of_epoch, labels = crops.read(batch.ids, epoch)
        assert (batch.images == pixels_of_epoch).all()
        assert batch.labels.tolist() == labels.tolist()


def test_views_that_cannot_be_are_told(tmp_path: Path):
    plain = shard_output(tmp_path, job(make_sizes(tmp_path / "photos")))
    with pytest.raises(ValueError, match=r"set shard\.pictures=source and shard\.view_px"):
        RandomCrops(plain, seed=0)
    with pytest.raises(ValueError, match=r"shard\.view_px=100"):
        ShardJob(source="x", resolution_px=256, view_px=100)
