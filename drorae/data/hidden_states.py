"""Hidden states of a frozen encoder, computed on the fly or once.

The encoder never changes during training, so its outputs can be kept: in memory for small sets, or
in one file for every 512 images. All modes return the same float16-rounded numbers,
so that the mode stays a question of speed.
Size: layers * tokens * width * 2 bytes an image (2.4 MB for DINOv2-S, 4.7 MB for DINOv2-B at 256
tokens).
"""

import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch

from drorae.config import digest
from drorae.data.batches import to_unit
from drorae.data.images import ImageShards
from drorae.models.encoder_config import EncoderConfig
from drorae.shapes import Float, Tensor
from drorae.store.context import StageContext
from drorae.store.errors import is_s3
from drorae.store.files import default_cache_path

CacheMode = Literal["none", "memory", "disk"]
"""Where hidden states are kept."""

BLOCK_IMAGES = 512
"""Images of one cache block."""

MOST_KEPT_BYTES = 200 * 10**9
"""Hidden states that are kept on disk at most: 42,000 images of DINOv2-B. ImageNet's would be 6 TB,
which cost more to read in each epoch than to compute."""

_ENCODER_LOCK = (
    threading.Lock()
)  # encoders collect block outputs by hooks: one forward at a time, whatever the thread


@runtime_checkable
class HiddenEncoder(Protocol):
    """What is needed of an encoder (`drorae.models.encoder.Encoder`)."""

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch layers tokens width"]:
        """Block outputs for pixels in [0, 1]."""
        ...


class HiddenStates:
    """Hidden states by image id.

    Args:
        shards: The images.
        encoder: Frozen encoder; must lie on the device on which it shall run.
        mode: Where results are kept.
        cache_path: Folder of mode `disk`; none: the user's cache.
        encoder_key: Digest of the encoder; none: that of its configuration and weights.
        batch_images: Images in one encoder call.

    Raises:
        ValueError: An unknown mode.
    """

    def __init__(
        self,
        shards: ImageShards,
        encoder: HiddenEncoder,
        mode: CacheMode = "none",
        cache_path: str | Path | None = None,
        *,
        encoder_key: str | None = None,
        batch_images: int = 32,
    ) -> None:
        if mode not in ("none", "memory", "disk"):
            raise ValueError(
                f"hidden-state mode {mode!r} is unknown: expected none, memory or disk."
            )
        self.shards = shards
        self.mode = mode
        self._encoder = encoder
        self._batch_images = batch_images
        self._blocks: dict[int, np.ndarray | BlockFile] = {}
        self._lock = threading.Lock()
        self._folder = Path()
        if mode == "disk":
            key = encoder_key or encoder_digest(encoder)
            self._folder = cache_folder(cache_path, shards, key)

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def num_blocks(self) -> int:
        """Cache blocks of the whole split."""
        return -(-len(self) // BLOCK_IMAGES)

    def read(self, ids: np.ndarray) -> Float[Tensor, "batch layers tokens width"]:
        """Hidden states (float16, CPU) of the ids, in their order; missing blocks are computed.

        Raises:
            RuntimeError: A hidden state does not fit float16.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if self.mode == "none":
            return torch.from_numpy(self._encode(ids))
        places = [divmod(int(i), BLOCK_IMAGES) for i in ids]
        rows = [self._block(number)[row] for number, row in places]
        return torch.from_numpy(np.stack(rows))

    def fill(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compute this rank's share of the blocks now, instead of at first use.

        With mode `memory` every rank holds its own copy, so each computes all of them.
        """
        if self.mode == "none":
            return
        mine = range(rank, self.num_blocks, world_size)
        wanted = range(self.num_blocks) if self.mode == "memory" else mine
        for done, number in enumerate(wanted, start=1):
            self._block(number)
            if on_progress is not None:
                on_progress(done, len(wanted))

    def _block(self, number: int) -> "np.ndarray | BlockFile":
        with self._lock:  # threads that want one block compute it once
            if number not in self._blocks:
                if self.mode == "memory":
                    self._blocks[number] = self._compute(number)
                else:
                    self._blocks[number] = self._from_disk(number)
            return self._blocks[number]

    def _compute(self, number: int) -> np.ndarray:
        first = number * BLOCK_IMAGES
        return self._encode(np.arange(first, min(first + BLOCK_IMAGES, len(self))))

    def _from_disk(self, number: int) -> "BlockFile":
        path = self._folder / f"block-{number:06d}.npy"
        if not path.is_file():
            _save(path, self._compute(number))
        return BlockFile(path)

    @torch.no_grad()
    def _encode(self, ids: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(ids), self._batch_images):
            images, _ = self.shards.read(ids[start : start + self._batch_images])
            pixels = to_unit(images.to(_device(self._encoder)))
            with _ENCODER_LOCK:
                hidden = self._encoder(pixels)
            parts.append(hidden.to(torch.float16).cpu())
        stacked = torch.cat(parts)
        if not bool(torch.isfinite(stacked).all()):
            raise RuntimeError(
                "hidden states exceed the range of float16 (65504): expected a bounded encoder. "
                "Check the encoder weights and encoder.image_mean and image_std."
            )
        return stacked.numpy()


class BlockFile:
    """Rows of a `.npy` file by number, read one at a time.

    Not memory-mapped: the pages of a mapping count as memory of the process that touches them (1.4
    GB in the smoke recipe), and the system's cache serves both alike.

    Args:
        path: A C-ordered array with at least two axes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, self._dtype = np.lib.format.read_array_header_1_0(file)
            self._start = file.tell()
        self._row_shape = shape[1:]
        self._row_values = int(np.prod(self._row_shape))

    def __getitem__(self, row: int) -> np.ndarray:
        offset = self._start + row * self._row_values * self._dtype.itemsize
        values = np.fromfile(self._path, self._dtype, self._row_values, offset=offset)
        if len(values) != self._row_values:
            raise RuntimeError(
                f"{self._path} ends before row {row}: expected a complete block; delete the file, "
                "the next run computes it again."
            )
        return values.reshape(self._row_shape)


def check_kept(
    mode: CacheMode, num_images: int, encoder: EncoderConfig, *, is_shared: bool
) -> None:
    """Refuse to keep hidden states on disk where that cannot work or does not pay.

    Args:
        mode: Where they are to be kept.
        num_images: Images of the split.
        encoder: Whose hidden states.
        is_shared: Whether all ranks use one folder: one machine, or one that the configuration
            names (`compute.cache_path`), which then has to lie on a file system of all machines.

    Raises:
        ValueError: Too many bytes, or a folder on each machine, which would hold the blocks that
            the ranks of that machine filled and no others.
    """
    if mode != "disk":
        return
    image_bytes = encoder.num_layers * encoder.grid**2 * encoder.width * 2
    num_bytes = num_images * image_bytes
    if num_bytes > MOST_KEPT_BYTES:
        raise ValueError(
            f"hidden_states=disk would keep {num_bytes / 1e9:,.0f} GB ({num_images:,} images of "
            f"{image_bytes / 1e6:.1f} MB): expected at most {MOST_KEPT_BYTES / 1e9:,.0f} GB. Use "
            "hidden_states=none, which encodes in the step."
        )
    if not is_shared:
        raise ValueError(
            "hidden_states=disk with ranks on several machines would keep other blocks on each: "
            "expected one folder. Set compute.cache_path to one that all machines share, or use "
            "hidden_states=none."
        )


def hidden_in_step(
    encoder: Callable[..., Tensor], blocks: tuple[int, ...]
) -> Callable[[Tensor], Tensor]:
    """Hidden states of a batch on its own device, rounded to float16 as all kept ones are.

    For images that differ in every epoch: nothing goes through the CPU and nothing is kept.

    Args:
        encoder: `drorae.models.encoder.Encoder`, on the device of the images.
        blocks: Block numbers to read; `drorae.models.fusion_config.blocks_read`.
    """

    def see(images: Tensor) -> Tensor:
        return encoder(images, layers=blocks).to(torch.float16).to(torch.float32)

    return see


def encoder_digest(encoder: HiddenEncoder) -> str:
    """Digest of an encoder's configuration and weights.

    Raises:
        ValueError: The encoder states neither.
    """
    config = getattr(encoder, "config", None)
    weights = getattr(encoder, "weights_digest", None)
    if config is None or weights is None:
        raise ValueError(
            f"{type(encoder).__name__} has no config and weights_digest: pass encoder_key, "
            "or use hidden-state mode none or memory."
        )
    return digest([config, weights()])


def cache_folder(cache_path: str | Path | None, shards: ImageShards, encoder_key: str) -> Path:
    """Folder of the disk cache of one split and encoder."""
    name = f"{shards.key}-{shards.split}-{encoder_key[:24]}"
    return Path(cache_path or default_cache_path()) / "hidden" / name


def hidden_cache_path(ctx: StageContext) -> Path:
    """Cache folder: `compute.cache_path`, else `cache` in a local workspace, else the user's."""
    if ctx.compute.cache_path:
        return Path(ctx.compute.cache_path)
    if is_s3(ctx.output_uri):
        return default_cache_path()
    return Path(ctx.output_uri).parents[2] / "cache"


def _device(encoder: HiddenEncoder) -> torch.device:
    if isinstance(encoder, torch.nn.Module):
        tensors = [*encoder.parameters(), *encoder.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")
    return torch.device("cpu")


def _save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.save(file, array)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
