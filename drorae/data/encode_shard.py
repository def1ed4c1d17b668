"""The task of the stage `latents`: encode the images of one shard and write their latents.

Each picture is decoded once, by threads, while the device works on the batch before; both views are
made of it there, and hidden states stay there too. Where the tokenizer's training kept those, and
no mirrored view is wanted, nothing is decoded. Rows go to the file while later ones are being
computed. One shard of latents is in memory at a time: rows * views * 0.4 MB at 768 x 16 x 16.
"""

import contextlib
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import safetensors.torch
import torch

from drorae.config import from_json
from drorae.data.assets.catalog import asset_path
from drorae.data.hidden_states import (
    HiddenStates,
    cache_folder,
    encoder_digest,
    hidden_cache_path,
    to_unit,
)
from drorae.data.images import ImageShards
from drorae.data.jobs import LatentJob
from drorae.data.latent_shards import COLUMNS, SPLIT
from drorae.data.order import ShardUse
from drorae.data.prefetch import prefetched
from drorae.data.shard_cache import node_cache
from drorae.data.shard_format import part_name, write_latent_shard
from drorae.data.shard_map import ShardTask
from drorae.data.statistics import Moments, RunningMoments
from drorae.models.autoencoder import tokens_to_map
from drorae.models.encoder import EncoderConfig, build_encoder
from drorae.models.fusion import FusionConfig, build_fusion
from drorae.models.matmul import number_format
from drorae.shapes import Float, Tensor, UInt8
from drorae.store import files
from drorae.store.context import StageContext


class EncodeShard:
    """Encode one shard; the encoder and the fusion are loaded once in an actor.

    Args:
        ctx: The stage.
        encoder: The frozen encoder.
        job: The job.
    """

    def __init__(self, ctx: StageContext, encoder: EncoderConfig, job: LatentJob) -> None:
        self._ctx, self._job = ctx, job
        self._device = torch.device(ctx.compute.device_type)
        self._encoder = build_encoder(encoder, asset_path).to(self._device)
        fusion = ctx.inputs["fusion"]
        settings = from_json(FusionConfig, fusion.read_json("config.json")["model"])
        eps = self._encoder.layer_norm_eps
        self._fusion = build_fusion(
            settings, self._encoder.num_layers, self._encoder.width, layer_norm_eps=eps
        )
        weights = files.read_bytes(fusion.uri_of("fusion.safetensors"))
        self._fusion.load_state_dict(safetensors.torch.load(weights))
        self._fusion.to(self._device).eval()
        self._images = ImageShards(
            ctx.inputs["shard"],
            SPLIT,
            cache=node_cache(ctx.compute),
            keep_bytes=0,  # an actor needs the images of its shards alone, each once
            threads=ctx.compute.loader_threads,
        )
        self._starts = np.cumsum([0, *self._images.shard_rows])
        self._kept_states = self._open_cache()
        self._reads_images = self._kept_states is None or job.flip

    def _open_cache(self) -> HiddenStates | None:
        """Hidden states that the tokenizer's training left on this machine."""
        cache, key = hidden_cache_path(self._ctx), encoder_digest(self._encoder)
        if not cache_folder(cache, self._images, key).is_dir():
            return None
        batch = self._job.batch_images
        return HiddenStates(
            self._images, self._encoder, "disk", cache, encoder_key=key, batch_images=batch
        )

    def __call__(self, task: ShardTask) -> dict[str, Any]:
        """Write the latents of the shard `part` of images, and the moments of the latents.

        Raises:
            RuntimeError: A latent does not fit float16.
        """
        part = int(task.payload["part"])
        if self._reads_images:
            self._images.follow([ShardUse(part, part, part)])
            self._images.reached(part)
        first, end = (int(row) for row in self._starts[part : part + 2])
        shape = (self._encoder.width, self._encoder.grid, self._encoder.grid)
        names = COLUMNS[: 1 + self._job.flip]
        rows = {name: np.empty((end - first, *shape), np.float16) for name in names}
        moments, filled = RunningMoments(shape, self._device), _Filled()
        name, labels = part_name(SPLIT, part), self._images.labels[first:end]
        with ThreadPoolExecutor(1, thread_name_prefix="write") as pool, filled:
            output = self._ctx.output_uri
            writing = pool.submit(
                write_latent_shard, output, name, rows, labels, first, filled.wait
            )
            for start, views in self._encoded(first, end, moments):
                inside = slice(start - first, start - first + len(views[0]))
                for column, latent in zip(rows.values(), views, strict=True):
                    column[inside] = latent.numpy()
                filled.reach(inside.stop)
            written = writing.result()
        self._write_moments(task.name, moments.result())
        return written.to_json() | {"task": task.name, "shape": list(shape)}

    def _encoded(
        self, first: int, end: int, moments: RunningMoments
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """First id and latents (CPU) of every batch, one behind what the device is given."""
        size = self._job.batch_images
        rows = [np.arange(start, min(start + size, end)) for start in range(first, end, size)]
        before: tuple[int, _Copies] | None = None
        steps = range(len(rows))
        with contextlib.closing(prefetched(lambda n: self._read(rows[n]), steps, 1)) as batches:
            for ids, images in zip(rows, batches, strict=True):
                views = self._views(ids, images)
                for latent in views:
                    moments.update(latent)
                started = int(ids[0]), _Copies(views)
                if before is not None:
                    yield before[0], before[1].finish()
                before = started
        if before is not None:
            yield before[0], before[1].finish()

    def _read(self, ids: np.ndarray) -> UInt8[Tensor, "batch 3 height width"] | None:
        """The images; none where kept hidden states tell all."""
        return self._images.read(ids)[0] if self._reads_images else None

    @torch.no_grad()
    def _views(
        self, ids: np.ndarray, images: UInt8[Tensor, "batch 3 height width"] | None
    ) -> list[Float[Tensor, "batch channels height width"]]:
        """Latents (float16) of the images, and of the mirrored ones if they are wanted."""
        with number_format(self._job.precision, self._device.type):
            kept = self._kept_states
            hidden = [] if kept is None else [kept.read(ids).to(self._device)]
            if images is not None:
                pixels = to_unit(images.to(self._device, non_blocking=True))
                if kept is None:
                    hidden.append(self._encoder(pixels))
                if self._job.flip:
                    hidden.append(self._encoder(pixels.flip(-1)))
            # Rounded as all kept hidden states are: the mode of keeping them changes no latent.
            fused = (self._fusion(h.to(torch.float16).to(torch.float32)).latent for h in hidden)
            return [tokens_to_map(tokens).to(torch.float16) for tokens in fused]

    def _write_moments(self, name: str, moments: Moments) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, count=moments.count, mean=moments.mean, m2=moments.m2)
        files.write_bytes(_moments_uri(self._ctx, name), buffer.getvalue())


class _Copies:
    """Latents on their way to the CPU.

    Args:
        latents: On their device.
    """

    def __init__(self, latents: list[Tensor]) -> None:
        is_cuda = latents[0].is_cuda
        self._copies = [
            torch.empty(latent.shape, dtype=latent.dtype, pin_memory=is_cuda).copy_(
                latent, non_blocking=is_cuda
            )
            for latent in latents
        ]
        self._finite = torch.stack([torch.isfinite(latent).all() for latent in latents]).all()
        self._event = torch.cuda.Event() if is_cuda else None
        if self._event is not None:
            self._event.record()

    def finish(self) -> list[Tensor]:
        if self._event is not None:
            self._event.synchronize()
        if not bool(self._finite):
            raise RuntimeError(
                "latents exceed the range of float16 (65504): expected values of order 1. The "
                "weights of the fusion or of the encoder are damaged; train the fusion again."
            )
        return self._copies


class _Filled:
    """How many rows are there, between the thread that fills them and the one that writes them.

    A context manager: an error inside ends the waiting.
    """

    def __init__(self) -> None:
        self._rows = 0
        self._is_given_up = False
        self._changed = threading.Condition()

    def __enter__(self) -> "_Filled":
        return self

    def __exit__(self, error: object, *rest: object) -> None:
        with self._changed:
            self._is_given_up = error is not None
            self._changed.notify_all()

    def reach(self, rows: int) -> None:
        with self._changed:
            self._rows = rows
            self._changed.notify_all()

    def wait(self, rows: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._rows >= rows or self._is_given_up)
            if self._is_given_up:
                raise RuntimeError("the rows of a shard of latents could not be computed")


def read_moments(ctx: StageContext, name: str) -> Moments:
    """The moments that the task of that name wrote."""
    arrays = np.load(io.BytesIO(files.read_bytes(_moments_uri(ctx, name))))
    return Moments(count=int(arrays["count"]), mean=arrays["mean"], m2=arrays["m2"])


def _moments_uri(ctx: StageContext, name: str) -> str:
    return files.join(ctx.work_uri, "moments", f"{name}.npz")
