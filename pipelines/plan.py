"""What a run would do: for every stage, what is there, missing or damaged, and why.

Planning reads manifests and sources only. `drorae plan` prints it, `drorae run` and the flow act on
it.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from drorae import recipes
from drorae.config import digest, override
from drorae.store import files
from drorae.store.manifest import DamagedOutput, Manifest
from drorae.store.workspace import WORK_NAME, Workspace
from pipelines import sources as image_sources
from pipelines import stages
from pipelines.code_version import entry_digest
from pipelines.reasons import last_wall_s, why_missing
from pipelines.sources import Sources

DEFAULT_WORKSPACE = "runs"
WORKSPACE_VARIABLE = "DRORAE_WORKSPACE"

State = Literal["present", "missing", "unfinished", "damaged", "forced", "code changed"]
NOT_THERE = ("missing", "unfinished", "damaged")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the caller asked for."""

    recipe: str = "smoke"
    """Name of the recipe."""
    overrides: tuple[str, ...] = ()
    """`section.field=value` assignments."""
    workspace: str = DEFAULT_WORKSPACE
    """Folder or s3:// address of the outputs."""
    only: str | None = None
    """Run this stage alone; its inputs have to be there."""
    from_stage: str | None = None
    """Run this stage and those that depend on it; what they read beside has to be there."""
    force: tuple[str, ...] = ()
    """Stages to build even if their output is there."""
    strict_code: bool = False
    """Build again what was built by other code, and all that depends on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One stage of a plan."""

    stage: str
    """Its name."""
    key: str
    """Key of its output."""
    state: State
    """What is there. `unfinished`: an earlier attempt left work that this one continues."""
    selected: bool
    """Whether this run may build it."""
    reason: str
    """Why it would run; empty when it is present."""
    code_changed: bool
    """Whether the output was built by other code."""
    expected_wall_s: float | None
    """Seconds of the last build of this stage here; None when there was none."""
    metrics: dict[str, float | None]
    """Final numbers of the output, if it is there."""

    @property
    def must_run(self) -> bool:
        """Whether this run builds it."""
        return self.selected and self.state != "present"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """A configuration, its keys, and what to do about each."""

    request: Request
    """What was asked."""
    full: Any
    """The configuration after overrides."""
    keys: dict[str, str]
    """Key of every enabled stage, in topological order."""
    sources: Sources
    """What the image sources contained when this plan was made."""
    steps: tuple[Step, ...]
    """One per enabled stage, in topological order."""

    @property
    def run_key(self) -> str:
        """Name of this pipeline run: the same configuration continues the same MLflow run."""
        return digest(self.keys)[:20]

    @property
    def is_complete(self) -> bool:
        """Whether nothing has to run."""
        return not any(step.must_run for step in self.steps)

    def stages_to_run(self) -> tuple[stages.Stage, ...]:
        """Return the stages that this run builds."""
        return tuple(
            stages.find_stage(step.stage, stages.STAGES) for step in self.steps if step.must_run
        )

    def input_keys(self, stage: stages.Stage) -> dict[str, str]:
        """Return the keys of the inputs of a stage."""
        return {name: self.keys[name] for name in stages.needs_of(self.full, stage, self.keys)}


def default_workspace() -> str:
    """Return the workspace of a run that names none: DRORAE_WORKSPACE, else `runs`."""
    return os.environ.get(WORKSPACE_VARIABLE) or DEFAULT_WORKSPACE


def configuration(recipe: str, overrides: Sequence[str]) -> Any:
    """Return the full configuration of a recipe after overrides.

    Raises:
        ValueError: For an unknown recipe or path, or a value that a field refuses.
    """
    return override(recipes.get(recipe), list(overrides))


def make_plan(
    request: Request, sources: Sources | None = None, *, reads_only: bool = False
) -> RunPlan:
    """Compare a configuration with the workspace.

    Cost grows with the files of the image sources, unless they are given
    (`drorae.data.fingerprint`), and with the outputs of the workspace.

    Args:
        request: What is asked.
        sources: What an earlier plan of this run found in the image sources; None looks at them.
        reads_only: Nothing will be built, so that sources need not be looked at again.

    Raises:
        ValueError: For an unknown recipe, path or stage, when `only` or `from_stage` leaves out
            something missing, or when a stage cannot work with an output that is there.
        FileNotFoundError: If the workspace's bucket does not exist.
    """
    full = configuration(request.recipe, request.overrides)
    table, workspace = stages.STAGES, Workspace(request.workspace)
    built = workspace.outputs()
    sources = image_sources.look(full, built, reads_only=reads_only) if sources is None else sources
    keys = stages.stage_keys(full, table, sources)
    selected = _selected(request, keys)
    steps: dict[str, Step] = {}
    behind: dict[str, list[Step]] = {}
    for stage in stages.enabled_stages(full, table):
        step = _step(stage, keys[stage.name], full, sources, workspace, built)
        step = dataclasses.replace(step, selected=stage.name in selected)
        needs = stages.needs_of(full, stage, keys)
        inputs = [one for name in needs for one in (steps[name], *behind[name])]
        step = _with_wishes(step, request, inputs)
        # A wish passes through a stage that is built for another reason.
        behind[stage.name] = inputs if step.must_run and step.state in NOT_THERE else []
        steps[stage.name] = step
    plan = RunPlan(
        request=request, full=full, keys=keys, sources=sources, steps=tuple(steps.values())
    )
    _check_inputs(plan)
    _check_outputs(plan, workspace)
    return plan


def _selected(request: Request, keys: dict[str, str]) -> set[str]:
    for name in filter(None, (request.only, request.from_stage, *request.force)):
        stages.find_stage(name, stages.STAGES)
        if name not in keys:
            raise ValueError(f"stage {name!r} is switched off by this configuration; switch it on.")
    if request.only and request.from_stage:
        raise ValueError("both only and from were given; expected at most one of them.")
    selected = set(keys)
    if request.only:
        selected = {request.only}
    if request.from_stage:
        selected = {request.from_stage, *stages.descendants(request.from_stage, stages.STAGES)}
    outside = sorted(set(request.force) - selected)
    if outside:
        raise ValueError(f"force names {outside}, which this run leaves out; select them too.")
    return selected & set(keys)


def _step(
    stage: stages.Stage,
    key: str,
    full: Any,
    sources: Sources,
    workspace: Workspace,
    built: Sequence[Manifest],
) -> Step:
    earlier = [manifest for manifest in built if manifest.stage == stage.name]
    config = stages.section_json(full, stage)
    state, reason, found = _look(stage, key, workspace)
    if state == "missing":
        read = {path: sources[path] for path in stage.sources(full) if path in sources}
        reason = why_missing(stage, config, read, workspace, earlier)
    return Step(
        stage=stage.name,
        key=key,
        state=state,
        selected=True,
        reason=reason,
        code_changed=found is not None and found.code_digest != entry_digest(stage.entry),
        expected_wall_s=found.wall_s if found else last_wall_s(config, earlier),
        metrics=dict(found.metrics) if found else {},
    )


def _look(
    stage: stages.Stage, key: str, workspace: Workspace
) -> tuple[State, str, Manifest | None]:
    try:
        output = workspace.find(stage.name, key)
    except DamagedOutput as error:
        return "damaged", "; ".join(error.problems), None
    if output is not None:
        return "present", "", output.manifest
    if files.list_files(files.join(workspace.stage_uri(stage.name, key), WORK_NAME)):
        return "unfinished", "an earlier attempt did not finish; it is continued", None
    return "missing", "", None


def _with_wishes(step: Step, request: Request, inputs: Sequence[Step]) -> Step:
    """Apply `force` and `strict_code` to a stage whose output is there, and what follows them."""
    if step.state != "present" or not step.selected:
        return step
    if step.stage in request.force:
        return dataclasses.replace(step, state="forced", reason="asked for by --force")
    if request.strict_code and step.code_changed:
        return dataclasses.replace(step, state="code changed", reason="built by other code")
    for state, why in (("forced", "by --force"), ("code changed", "by changed code")):
        again = dict.fromkeys(needed.stage for needed in inputs if needed.state == state)
        if again:
            reason = f"{', '.join(again)} is built again {why}"
            return dataclasses.replace(step, state=state, reason=reason)
    return step


def _check_outputs(plan: RunPlan, workspace: Workspace) -> None:
    asking = plan.stages_to_run()
    for step in plan.steps:
        if any(step.stage in stage.checks for stage in asking):
            is_there = step.state == "present"
            output = workspace.find(step.stage, step.key, verify="none") if is_there else None
            stages.check_output(plan.full, step.stage, output, asking)


def _check_inputs(plan: RunPlan) -> None:
    by_name = {step.stage: step for step in plan.steps}
    for step in plan.steps:
        if not step.must_run:
            continue
        stage = stages.find_stage(step.stage, stages.STAGES)
        for name in stages.needs_of(plan.full, stage, plan.keys):
            needed = by_name[name]
            if not needed.selected and needed.state != "present":
                raise ValueError(
                    f"stage {step.stage} reads the output of {name}, which is {needed.state} in "
                    f"{plan.request.workspace} ({needed.reason}); run without --only and "
                    f"--from, or `drorae run --only {name}` first."
                )
