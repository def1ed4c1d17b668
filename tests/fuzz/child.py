"""`python -m tests.fuzz.child READER SEED FIRST SECONDS FOLDER`: iterations until time is over.

Writes a line of JSON before each iteration and one for each failure, so that whoever started it
knows at what it hangs or crashes. Memory is limited. The source
of an iteration stays in FOLDER unless all was well.
"""

import itertools
import json
import resource
import shutil
import sys
import time
import traceback
import warnings
from pathlib import Path

from tests.fuzz.content import Fault
from tests.fuzz.readers import iterate, source_folder

ROOM_BYTES = 1 << 30
"""Address space beyond what is taken after the imports; inputs are a few kB."""


def main(reader: str, seed: int, first: int, seconds: float, folder: Path) -> None:
    """Run iterations from number `first` on."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=ResourceWarning)
    limit_memory()
    stop_s = time.monotonic() + seconds
    for iteration in itertools.count(first):
        if time.monotonic() > stop_s:
            break
        _tell({"begin": iteration})
        place = source_folder(folder, reader, seed, iteration)
        place.mkdir()
        try:
            iterate(reader, seed, iteration, place)
        except Exception as error:
            _tell({"failed": iteration, "reason": describe(error)})
        else:
            shutil.rmtree(place)
    _tell({"end": True})


def limit_memory() -> None:
    """Bound the address space of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def describe(error: Exception) -> str:
    """What went wrong; of what a reader let escape also where."""
    if isinstance(error, Fault):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = next((f for f in reversed(frames) if "drorae" in f.filename), frames[-1])
    text = f"{type(error).__name__}: {error}"
    return f"escaped: {text[:500]} ({Path(place.filename).name}:{place.lineno})"


def _tell(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), Path(sys.argv[5]))
