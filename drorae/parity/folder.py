"""What the halves of a folder share: reading it, one check, its outcome."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from drorae.models.weights_file import read_weights
from drorae.shapes import Tensor

__all__ = ["TOLERANCE", "Check", "Outcome", "Part", "max_abs_error", "run_checks"]

TOLERANCE = 2e-5  # one evaluation in float32, sums in another order
LABELS = ("y", "labels")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Result of one check."""

    name: str
    """Name of the expected tensor."""
    status: str
    """`ok`, `FAIL` or `skipped`."""
    error: float = math.nan
    """Largest absolute difference; nan where there is none."""
    tolerance: float = math.nan
    """Largest difference that is ok."""
    reason: str = ""
    """Why it failed or was skipped."""

    def line(self) -> str:
        """The line that is shown."""
        if self.status == "skipped":
            return f"{self.name} skipped: {self.reason}"
        shown = f"{self.name} {self.error:.3e} {self.tolerance:.0e} {self.status}"
        return f"{shown} {self.reason}".rstrip()


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """How one expected tensor is computed again."""

    compute: Callable[[Any], Tensor]
    """From the opened part of the folder."""
    inputs: tuple[str, ...] = ()
    """Tensors that it reads."""
    files: tuple[str, ...] = ()
    """Files that it needs beside configuration and tensors."""
    tolerance: float = TOLERANCE
    """Largest difference that is ok."""


class Part:
    """One of the two halves of a folder: its configuration file and its tensors, read when needed.

    Args:
        folder: Where the files lie.
    """

    config_file: str
    io_file: str
    checks: Mapping[str, Check]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.passed_over: dict[str, None] = {}
        """Unknown keys of the configuration file, in the order found. They change no verdict: what
        they might change shows in the tensors."""

    @cached_property
    def io(self) -> dict[str, Tensor]:
        """Inputs and expected outputs."""
        return read_weights(self.folder / self.io_file).tensors

    @cached_property
    def content(self) -> Mapping[str, Any]:
        """The parsed configuration file."""
        try:
            content = json.loads((self.folder / self.config_file).read_bytes())
        except ValueError as error:
            raise ValueError(f"{self.config_file} is no JSON: {error}") from error
        if not isinstance(content, Mapping):
            raise ValueError(f"{self.config_file} holds no fields: expected a JSON object.")
        return content

    def path(self, file: str) -> Path:
        """Where a file lies: weights may also be a `.pt` file of the same name."""
        path = self.folder / file
        pickled = path.with_suffix(".pt")
        return path if _is_there(path) or not _is_there(pickled) else pickled

    def read(self, name: str) -> Tensor:
        """An input in the type that the networks take.

        Raises:
            ValueError: If it is absent.
        """
        if name not in self.io:
            raise ValueError(f"{self.io_file} lacks {name!r}: expected the input of this check")
        return self.io[name].long() if name in LABELS else self.io[name].float()


def run_checks(part: Part) -> Iterator[Outcome]:
    """Run every check that the files allow, and name the tensors and keys that no check reads."""
    for name, check in part.checks.items():
        yield _run(part, name, check)
    yield from _unchecked(part)
    for key in part.passed_over:
        yield Outcome(name=key, status="skipped", reason=f"unknown key of {part.config_file}")


def max_abs_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; nan if any value of either is not finite.

    Raises:
        ValueError: If the shapes differ or there is nothing to compare.
    """
    if found.shape != expected.shape:
        raise ValueError(f"computed shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    if not expected.numel():
        raise ValueError(f"the expected tensor {tuple(expected.shape)} is empty")
    difference = (found.double() - expected.double()).abs()
    return difference.max().item() if difference.isfinite().all() else math.nan


def _run(part: Part, name: str, check: Check) -> Outcome:
    files = (part.config_file, part.io_file, *check.files)
    for file in files:
        if not _is_there(part.path(file)):
            return Outcome(name=name, status="skipped", reason=f"{file} is missing")
    try:
        for file in files:
            if not part.path(file).is_file():
                raise ValueError(f"{file} is no file: expected one, or nothing of that name")
        if name not in part.io:
            reason = f"{part.io_file} holds no {name}"
            return Outcome(name=name, status="skipped", reason=reason)
        with torch.no_grad():
            error = max_abs_error(check.compute(part), part.io[name])
    except Exception as error:  # any: the folder is a stranger's, and the other checks go on
        reason = " ".join(str(error).split()) or type(error).__name__
        return Outcome(name=name, status="FAIL", tolerance=check.tolerance, reason=reason)
    status = "ok" if error <= check.tolerance else "FAIL"
    return Outcome(
        name=name,
        status=status,
        error=error,
        tolerance=check.tolerance,
        reason="values are not finite" if math.isnan(error) else "",
    )


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # a link to nothing is no absent file


def _unchecked(part: Part) -> Iterator[Outcome]:
    """Tensors of the file that no check reads."""
    try:
        found = part.io.keys()
    except Exception:  # unreadable or absent: the checks have said so
        return
    known = part.checks.keys() | {name for check in part.checks.values() for name in check.inputs}
    for name in sorted(found - known):
        yield Outcome(name=name, status="skipped", reason=f"unknown tensor of {part.io_file}")
