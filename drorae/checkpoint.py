"""Training checkpoints: written whole or not at all, checked before use, newest intact one chosen.

A checkpoint is `step-00000500.pt` and, written after it, `step-00000500.json` with its size and
sha256. Without an intact pair there is no checkpoint, so a torn write is never restored. Weights of
finished stages are not here: those are safetensors files in the stage's output.
"""

import hashlib
import io
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drorae.store import files

__all__ = ["TrainingCheckpoints", "load_weights", "weights_bytes"]


@dataclass(kw_only=True, slots=True)
class TrainingCheckpoints:
    """Checkpoints of one stage under `<work_uri>/checkpoints`.

    Args:
        work_uri: The stage's working folder, local or s3://.
        every_steps: Steps between checkpoints.
        every_s: Seconds after which one is due anyway.
        keep: Number of newest checkpoints kept.
    """

    work_uri: str
    every_steps: int
    every_s: float
    keep: int
    last_s: float = 0.0

    def __post_init__(self) -> None:
        """Start the clock."""
        self.last_s = time.monotonic()

    @property
    def folder(self) -> str:
        """Where the files lie."""
        return files.join(self.work_uri, "checkpoints")

    def due(self, step: int) -> bool:
        """Whether a checkpoint should be written after `step` finished steps."""
        return step % self.every_steps == 0 or time.monotonic() - self.last_s >= self.every_s

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write one checkpoint, marker last, then delete all but the newest `keep`."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        name = f"step-{step:08d}"
        entry = files.write_bytes(files.join(self.folder, f"{name}.pt"), buffer.getvalue())
        marker = {"step": step, "size_bytes": entry.size_bytes, "sha256": entry.sha256}
        files.write_json(files.join(self.folder, f"{name}.json"), marker)
        for old in self._names()[: -self.keep]:
            files.delete(files.join(self.folder, f"{old}.json"))
            files.delete(files.join(self.folder, f"{old}.pt"))
        self.last_s = time.monotonic()

    def latest(self) -> dict[str, Any] | None:
        """State of the newest intact checkpoint, on the CPU; None if there is none."""
        for name in reversed(self._names()):
            state = self._load(name)
            if state is not None:
                return state
        return None

    def _names(self) -> list[str]:
        names = files.list_files(self.folder)
        return sorted(n.removesuffix(".json") for n in names if n.endswith(".json"))

    def _load(self, name: str) -> dict[str, Any] | None:
        marker = files.read_json(files.join(self.folder, f"{name}.json"))
        uri = files.join(self.folder, f"{name}.pt")
        if not files.exists(uri):
            return None
        data = files.read_bytes(uri)
        if (
            len(data) != marker["size_bytes"]
            or hashlib.sha256(data).hexdigest() != marker["sha256"]
        ):
            return None
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def weights_bytes(state: dict[str, Tensor]) -> bytes:
    """A state dict as safetensors, contiguous, on the CPU."""
    from safetensors.torch import save

    return save({name: value.detach().cpu().contiguous() for name, value in state.items()})


def load_weights(path: str) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU."""
    from safetensors.torch import load_file

    return load_file(path)
