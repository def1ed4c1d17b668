"""Which source files a stage runs, and their digest.

The files are those that the module of the stage's entry function imports, directly or not, inside
its own top-level package; found by reading the sources, so that planning imports no torch. A
changed comment in the report therefore does not make `drorae plan` say that the code of the
training stages changed.
"""

import ast
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from drorae.store.keys import code_digest


@functools.cache
def entry_digest(entry: str) -> str:
    """Return the digest of all source files that `module:function` runs.

    Raises:
        ValueError: If the module has no source file.
    """
    return code_digest(*source_files(entry.partition(":")[0]))


def source_files(module: str) -> list[Path]:
    """Return the files of a module and of all that it imports from its own top-level package."""
    top = module.partition(".")[0]
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"stage entry {module!r}: package {top!r} cannot be found; install it first."
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    start = _file_of(module, root)
    if start is None:
        raise ValueError(f"stage entry {module!r} has no source file under {root}.")
    found, waiting = {start}, [start]
    while waiting:
        for name in _imported_names(waiting.pop()):
            path = _file_of(name, root)
            if path is not None and path not in found:
                found.add(path)
                waiting.append(path)
    return sorted(found)


def _imported_names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            # The imported name may itself be a module.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _file_of(module: str, root: Path) -> Path | None:
    top, *rest = module.split(".")
    if top != root.name:
        return None
    path = root.joinpath(*rest)
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if rest and candidate.is_file():
            return candidate
    return None
