"""Whether what an unfinished attempt left still fits the inputs.

A key names its inputs by their keys, and an input that is built again under its key may have other
bytes. Checkpoints and markers made from the former ones must not be continued.
"""

import logging
from collections.abc import Mapping

from drorae.config import digest
from drorae.store import files
from drorae.store.context import StageContext
from drorae.store.files import join
from drorae.store.workspace import StageOutput

log = logging.getLogger(__name__)

INPUTS_NAME = "inputs.json"
"""File in the work folder: digests of the inputs that its content was made from, by stage name."""


def drop_work_of_other_inputs(ctx: StageContext) -> None:
    """Empty the work folder if an input has other files than at its start; note the present ones.

    Call it under the lease, before anything is read from the folder.
    """
    if not ctx.inputs:
        return
    uri, present = join(ctx.work_uri, INPUTS_NAME), _digests(ctx.inputs)
    known = files.read_json(uri) if files.exists(uri) else present
    if known != present:
        changed = sorted(name for name in present if known.get(name) != present[name])
        log.warning(
            "stage %s starts afresh: %s was built again since its last attempt, and what that one "
            "left does not fit any more.",
            ctx.stage,
            ", ".join(changed),
        )
        for name in files.list_files(ctx.work_uri):
            if name != INPUTS_NAME:  # stays to the last, for a process that is killed here
                files.delete(join(ctx.work_uri, name))
    files.write_json(uri, present)


def _digests(inputs: Mapping[str, StageOutput]) -> dict[str, str]:
    return {
        name: digest([[entry.name, entry.sha256] for entry in output.manifest.files])
        for name, output in inputs.items()
    }
