"""Check of how often a rerun that has nothing to do asks the store.

For comparison, the code of 2026-11-24 needed 64 requests for 2,591 files.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

from drorae.store import files
from drorae.store.workspace import Workspace
from tests.rehearsal.bench import Bench
from tests.rehearsal.line import Line
from tests.rehearsal.outputs import committed

STAGES = 10
WRITERS = 16


def rerun(bench: Bench) -> Iterator[Line]:
    """Look whether the outputs of ten stages are complete, two of them with most of the files."""
    workspace = f"{bench.bucket}/rerun"
    count = bench.sizes.output_files
    for stage in range(STAGES):
        share = count * 2 // 5 if stage < 2 else count // 5 // (STAGES - 2)
        _write_output(workspace, f"stage{stage}", share)
    link = bench.new_link()
    with mock.patch.dict("os.environ", AWS_ENDPOINT_URL=link.endpoint):
        found = Workspace(workspace)
        complete = [found.find(f"stage{stage}", "key") for stage in range(STAGES)]
    if not all(complete):
        raise RuntimeError(f"only {sum(map(bool, complete))} of {STAGES} outputs were found")
    yield Line(
        check="rerun",
        what=f"requests for {STAGES} outputs with {count:,} files",
        measured=link.num_requests,
        bound=64,
    )


CHECKS = {"rerun": rerun}


def _write_output(workspace: str, stage: str, count: int) -> None:
    uri = f"{workspace}/stages/{stage}/key"
    names = [f"train/part-{number:05d}.arrow" for number in range(count)]
    with ThreadPoolExecutor(WRITERS) as pool:
        entries = pool.map(
            lambda name: files.write_bytes(files.join(uri, name), name.encode()), names
        )
        named = [
            files.FileEntry(name=name, size_bytes=entry.size_bytes, sha256=entry.sha256)
            for name, entry in zip(names, entries, strict=True)
        ]
    committed(uri, stage, named)
