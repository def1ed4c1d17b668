"""Keys that name a stage's output by what went into it.

The key covers stage name, stage version, the part of the configuration that the stage uses and the
keys of its inputs. The code is not part of it: its digest is recorded beside the output, and `plan`
shows a difference, since nobody wants a comment to throw away a week of training.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drorae.config import digest

# 80 bits: among a billion outputs of one stage the chance of any collision is below one in a
# million.
KEY_HEX_DIGITS = 20


def stage_key(stage: str, version: int | str, config: Any, input_keys: Mapping[str, str]) -> str:
    """Key of a stage's output: hex text, equal on every machine for equal arguments.

    Args:
        stage: Stage name.
        version: Raised by hand when the stage's meaning changes.
        config: What the stage's result depends on: a dataclass or its JSON form. The order of
            fields does not matter; floats count by their shortest exact text (`repr`).
        input_keys: Key of every input, by stage name.

    Raises:
        ValueError: If the configuration holds what JSON cannot hold exactly.
    """
    parts = {
        "stage": stage,
        "version": str(version),
        "config": config,
        "inputs": dict(input_keys),
    }
    return digest(parts)[:KEY_HEX_DIGITS]


def code_digest(*package_roots: str | Path) -> str:
    """Sha256 over the names and contents of all Python files under some folders.

    Args:
        package_roots: Folders or single files; only their own name counts, not where they lie.

    Raises:
        FileNotFoundError: If a root does not exist.
    """
    total = hashlib.sha256()
    for root in sorted((Path(r) for r in package_roots), key=lambda path: path.name):
        if not root.exists():
            raise FileNotFoundError(f"{root} does not exist: expected a package folder or a file.")
        for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
            name = path.relative_to(root.parent).as_posix()
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            total.update(f"{name}\0{content}\n".encode())
    return total.hexdigest()
