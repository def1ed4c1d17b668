from pathlib import Path

import numpy as np
import pytest
from data_fakes import job, make_folder, shard_output

from drorae.data.images import ImageShards


@pytest.fixture
def output(tmp_path: Path):
    return shard_output(tmp_path, job(make_folder(tmp_path / "photos", per_class=8)))


def test_both_ways_of_reading_agree(output):
    kept = ImageShards(output, "train")
    packed = ImageShards(output, "train", keep_bytes=0)
    ids = np.array([5, 0, len(kept) - 1, 5])
    images, labels = kept.read(ids)
    again, again_labels = packed.read(ids)
    assert images.shape == (4, 3, 16, 16)
    assert (images == again).all()
    assert (labels == again_labels).all()
    assert (images[0] == images[3]).all()
    assert labels.tolist() == kept.labels[ids].tolist()


def test_split_knows_its_size_and_classes(output):
    shards = ImageShards(output, "val")
    assert len(shards) == output.read_json("counts.json")["val"]["rows"]
    assert shards.class_names == ("cat", "dog")
    assert shards.resolution_px == 16


def test_wrong_ids_and_splits_are_told(output):
    with pytest.raises(IndexError, match="out of range"):
        ImageShards(output, "train").read(np.array([10_000]))
    with pytest.raises(ValueError, match="split='test'"):
        ImageShards(output, "test")
