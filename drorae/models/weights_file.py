"""Reading a file of tensors that others wrote: pickle or safetensors, bare or in a checkpoint.

Pickles are read with weights only. Whatever is wrong with a file, the error is one `ValueError`
that names it: the readers underneath raise half a dozen kinds for a damaged file.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file

from drorae.shapes import Float, Tensor

__all__ = ["Container", "FoundWeights", "read_mapping", "read_weights"]

Container = Literal["safetensors", "pickle"]
"""File format."""

WRAPPER_NAMES = frozenset({"module", "_orig_mod"})  # DistributedDataParallel, torch.compile
REASON_CHARS = 120


class FoundWeights(NamedTuple):
    """Tensors of a file, and how they lay in it."""

    tensors: dict[str, Float[Tensor, "..."]]
    """By name, without the name parts of wrappers."""
    container: Container
    """File format."""
    weights: Literal["ema", "model", "plain"]
    """Which weights of a training checkpoint were taken; plain where there is no choice."""
    wrappers: tuple[str, ...]
    """Names of DDP or compile that were removed."""


def read_weights(path: Path, prefer: Literal["ema", "model"] = "ema") -> FoundWeights:
    """Read a state dict, or the weights of a training checkpoint.

    Args:
        path: A pickle of torch or safetensors; the content tells which.
        prefer: Weights to take from a training checkpoint that has both.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it cannot be read or holds something else.
    """
    content, container = read_mapping(path)
    chosen, weights = _choose_weights(content, prefer, path)
    tensors, wrappers = _strip_wrappers(chosen, path)
    return FoundWeights(tensors, container, weights, wrappers)


def read_mapping(path: Path) -> tuple[Mapping[str, Any], Container]:
    """Read whatever lies under names in a file, and its format.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it cannot be read or holds no names.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: expected tensors; check the path.")
    container = _container(path)
    content = _load(path, container)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected a dict of tensors.")
    odd = [key for key in content if not isinstance(key, str)]
    if odd:
        raise ValueError(f"{path} holds the key {odd[0]!r}: expected names of tensors.")
    return content, container


def _container(path: Path) -> Container:
    """By content, because files get renamed; by name where the beginning tells nothing."""
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(b"PK"):  # a zip archive, as torch writes
        return "pickle"
    is_safetensors = head[8:] == b"{" or path.suffix == ".safetensors"  # JSON behind its length
    return "safetensors" if is_safetensors else "pickle"


def _load(path: Path, container: Container) -> Any:
    try:
        if container == "safetensors":
            return load_file(path)
        with path.open("rb") as file:  # torch itself would go by the name of a path
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds objects other than tensors, or is no torch file: expected weights only; "
            "extract the state dict where the file was made."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # any: EOFError, KeyError, OSError, RuntimeError, SafetensorError
        sentence = " ".join(str(error).split()).split(". ")[0]  # torch goes on with advice
        reason = f"{type(error).__name__} {sentence[:REASON_CHARS]}".strip()
        raise ValueError(
            f"{path} cannot be read as {container} ({reason}): expected a complete file of "
            "tensors; fetch or write it again."
        ) from error


def _choose_weights(
    content: Mapping[str, Any], prefer: Literal["ema", "model"], path: Path
) -> tuple[Mapping[str, Any], Literal["ema", "model", "plain"]]:
    """Take EMA or online weights of a training checkpoint; a state dict is taken as it is."""
    other: Literal["ema", "model"] = "model" if prefer == "ema" else "ema"
    for name in (prefer, other):
        if isinstance(content.get(name), Mapping):
            return content[name], name
    if not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(
            f"{path} holds no tensors under {sorted(content)[:8]}: expected a state dict or a "
            "checkpoint with `ema` or `model`."
        )
    return content, "plain"


def _strip_wrappers(
    tensors: Mapping[str, Any], path: Path
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Drop the name parts that DDP and compile add, wherever they stand."""
    found: set[str] = set()
    stripped: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: {key} is a {type(value).__name__}, expected a tensor; pass a state dict."
            )
        parts = str(key).split(".")
        found.update(WRAPPER_NAMES.intersection(parts))
        name = ".".join(part for part in parts if part not in WRAPPER_NAMES)
        if name in stripped:
            raise ValueError(
                f"{path} holds {name} twice, with and without {sorted(found)}: expected one of "
                "them; pass one state dict."
            )
        stripped[name] = value
    return stripped, tuple(sorted(found))
