"""Configuration of the stages `shard` and `latents` and of the order of training samples.

Planning a run imports nothing heavier.
"""

from dataclasses import dataclass
from typing import Literal

from drorae.config import expand_home


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardJob:
    """Which raw images become which shards."""

    source: str
    """Image folder, .tar (webdataset), .zip or .parquet file, a folder of those, local or s3://, or
    `asset:cifar10`."""
    val_source: str | None = None
    """Separate source of validation images; none: `source` states its splits or `val_fraction`
    makes one."""
    val_fraction: float = 0.02
    """Share of `source` that is validation, chosen by the hash of (seed, key). Ignored where splits
    are given."""
    resolution_px: int = 256
    """Side of the square images in pixels. Paper: ImageNet at 256."""
    crop: Literal["center", "resize"] = "center"
    """`center`: ADM centre crop (RAE evaluation protocol); `resize`: squash to a square."""
    pictures: Literal["square", "source"] = "square"
    """What a shard holds of each image. `square`: the square of `resolution_px` as an exact PNG, so
    that loading is cheap whatever the source. `source`: the file as it is (pixel arrays as a PNG of
    the whole image), from which the same square, or a random crop, is made at load: about a third
    of the work here and, for ImageNet, the source's 115 kB an image, where a square of 256 px takes
    about 110 kB and allows no crops; large photos cost their size at each load."""
    view_px: int | None = None
    """Shorter side to which random crops scale a training image, aspect kept; none: no random
    crops. RAE stage 1: int(1.5 * resolution_px). Needs `pictures="source"`."""
    max_train_images: int | None = None
    """Cap of the training split, spread evenly over classes; none: all."""
    max_val_images: int | None = None
    """Cap of the validation split, spread evenly over classes; none: all."""
    rows_per_shard: int = 4096
    """Images in one shard; the last one holds fewer, as does one of more than 512 MiB."""
    min_side_px: int = 16
    """Images with a shorter side below this are rejected. The smallest ImageNet images have about
    20 px."""
    max_aspect_ratio: float = 20.0
    """Images with a larger ratio of longer to shorter side are rejected: a centre crop shows
    nothing of them."""
    max_pixels: int = 100_000_000
    """Images with more pixels are rejected before decoding (decompression bombs)."""
    duplicates: Literal["reject", "keep"] = "reject"
    """Files of equal content: keep the first only, or all, as published ImageNet protocols do."""
    image_column: str = "image"
    """Image column of Parquet sources."""
    label_column: str | None = "label"
    """Label column of Parquet sources and of metadata files; null: the images have no labels."""
    image_key: str | None = None
    """Extension of a webdataset sample that is its image (`jpg`, `rgb.png`); null: the only one
    that is an image."""
    label_key: str | None = None
    """Extension (`cls`) or JSON field of a webdataset sample that is its label; null: `cls`, or one
    of the fields label, cls, class, class_name of `json`."""
    classes_from: Literal["auto", "folders", "archives", "none"] = "auto"
    """What names the class of images beside which no label stands: their first folder, or the
    archive that holds them (one archive per class). `auto` chooses and reports what it chose."""
    label_file: str | None = None
    """Labels of images that lie flat: lines `NAME LABEL`, or a CSV file with a header. A label is a
    class name, or the number of a class in sorted order from 0."""
    val_label_file: str | None = None
    """The same for validation images, in `val_source` or in a folder `val` of `source`; ImageNet's
    own need it."""
    seed: int = 0
    """Seed of the order, the split and the choice under a cap."""

    def __post_init__(self) -> None:
        """Check ranges."""
        expand_home(self, "source", "val_source", "label_file", "val_label_file")
        for name in ("resolution_px", "rows_per_shard", "min_side_px", "max_pixels"):
            _require(getattr(self, name) >= 1, f"shard.{name}", getattr(self, name), "at least 1")
        for name in ("max_train_images", "max_val_images"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"shard.{name}", value, "at least 1, or null")
        _require(self.seed >= 0, "shard.seed", self.seed, "0 or more")
        _require(bool(self.source), "shard.source", self.source, "a path or URI")
        _require(0 <= self.val_fraction < 1, "shard.val_fraction", self.val_fraction, "0 up to 1")
        ratio = self.max_aspect_ratio
        _require(ratio >= 1, "shard.max_aspect_ratio", ratio, "at least 1")
        fits = self.view_px is None or self.view_px >= self.resolution_px
        _require(fits, "shard.view_px", self.view_px, f"{self.resolution_px} or more, or null")
        if self.view_px is not None and self.pictures != "source":
            raise ValueError(
                f"shard.view_px={self.view_px} with shard.pictures={self.pictures!r}: random crops "
                "need whole images. Set shard.pictures='source', or shard.view_px=null."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentJob:
    """How training images are encoded once for the diffusion stages."""

    dtype: Literal["float16"] = "float16"
    """Stored number format; the relative rounding error is below 5e-4."""
    batch_images: int = 32
    """Images in one encoder call."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Number format of the products of encoder and fusion; the result is stored in float16 all the
    same. `tf32` uses a GPU's TF32 units. `bfloat16` moves a latent by 0.8 % of its deviation (root
    mean square, at most 4 %) and lowers the variance by 0.2 %, 16 times what storing rounds: a
    random encoder of 12 blocks and width 192 on a CPU, 2026-11-25."""
    flip: bool = False
    """Store the latent of the mirrored image too, so that training can flip as RAE's stage 2
    does."""
    stats: Literal["computed", "imported"] = "computed"
    """Mean and variance per element: of these latents, or those imported with a released decoder
    (`decoder.released_stats`; fusion of kind `rae` only)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _require(self.batch_images >= 1, "latents.batch_images", self.batch_images, "at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderConfig:
    """In which order training reads the samples of an epoch (`drorae.data.order`).

    It changes every number of a training, so it belongs to the recipe and not to the machines that
    it runs on. The defaults shuffle any set uniformly, for which every worker reads all shards.
    """

    streams: int = 1
    """Parts of an epoch's shards that are read side by side; every batch takes as many samples of
    each. Must divide `batch_images`. A multiple of the nodes lets each node read its part of the
    shards alone, a multiple of the workers each worker; with fewer streams than nodes or workers,
    some share one. ImageNet recipes: 64."""
    window_shards: int = 0
    """Shards of a stream among which its rows are shuffled; a stream keeps about one more open. 0:
    all of the stream. ImageNet recipes: 4."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _require(self.streams >= 1, "order.streams", self.streams, "at least 1")
        few = self.window_shards
        _require(few >= 0, "order.window_shards", few, "at least 1, or 0 for whole streams")


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r} is out of range: expected {expected}.")
