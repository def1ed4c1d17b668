"""Results of finished tasks, so that a rerun of thousands of tasks costs few requests.

The driver repeats the results of `BUNDLE_RESULTS` markers in one file below `done/bundles`. A rerun
lists the markers (on S3 1,000 a request) and reads the bundles, and only markers that are in none.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from drorae.store import files

BUNDLE_RESULTS = 256
"""Results in one bundle."""

READ_THREADS = 16
"""Markers and bundles read at the same time."""


class KnownResults:
    """The results of finished tasks, of this attempt and of earlier ones.

    Args:
        done_uri: Folder of the markers.
    """

    def __init__(self, done_uri: str) -> None:
        self._done_uri = done_uri
        self._waiting: dict[str, dict[str, Any]] = {}
        self._num_bundles = 0

    def read(self, names: set[str]) -> dict[str, dict[str, Any]]:
        """Results of the tasks among `names` that have a marker."""
        present = [name for name in files.list_files(self._done_uri) if name.endswith(".json")]
        bundles = [name for name in present if name.startswith("bundles/")]
        self._num_bundles = len(bundles)
        marked = names & {name.removesuffix(".json") for name in present}
        found = {
            name: result
            for bundle in (self._read_all(bundles) if marked else [])
            for name, result in bundle.items()
            if name in marked
        }
        single = sorted(marked - set(found))
        results = self._read_all([f"{name}.json" for name in single])
        for name, result in zip(single, results, strict=True):
            found[name] = result
            self.add(name, result)
        return found

    def _read_all(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        with ThreadPoolExecutor(READ_THREADS) as pool:
            uris = [files.join(self._done_uri, name) for name in names]
            yield from pool.map(files.read_json, uris)

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Take a result; enough of them are written."""
        self._waiting[name] = result
        if len(self._waiting) >= BUNDLE_RESULTS:
            self.write()

    def write(self) -> None:
        """Write what waits, unless that saves no request."""
        if len(self._waiting) > 1:
            name = f"bundles/{self._num_bundles:05d}.json"
            files.write_json(files.join(self._done_uri, name), self._waiting)
            self._num_bundles += 1
        self._waiting = {}
