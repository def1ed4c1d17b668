"""The Prefect flow `drorae`: one task per stage, an explicit edge for every need.

Prefect orders, retries and shows. Whether a stage has to run is decided by the keys of
drorae.store, never by Prefect's cache, and the work happens in the stage's own job. Tasks pass only
strings.
"""

from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture, wait
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import Task

from drorae.store.workspace import Workspace
from pipelines import stages
from pipelines.artifacts import publish
from pipelines.launch import StageFailed, Stopped
from pipelines.plan import Request, RunPlan, default_workspace, make_plan
from pipelines.session import CONTROLS, SESSION, Session

RETRY_DELAY_S = 3
# A task holds its thread while it waits for its inputs, so every stage needs one.
# Any: Prefect's annotation of `flow` refuses its own task runners (3.8.8).
TASK_RUNNER: Any = ThreadPoolTaskRunner(max_workers=64)


def _can_retry(_task: Task, _run: TaskRun, state: State) -> bool:
    """Retry what may work the next time; never what would come again or a run that was stopped."""
    error = state.result(raise_on_failure=False)
    return not (
        isinstance(error, Stopped | ValueError)
        or (isinstance(error, StageFailed) and error.error.is_final)
    )


@task(
    name="stage",
    task_run_name="{stage}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retry_condition_fn=_can_retry,
    retry_delay_seconds=RETRY_DELAY_S,
)
def run_stage(stage: str, key: str) -> str:
    """Bring one stage to its output; returns the output's address. The key is shown in the UI."""
    return SESSION.get().run(stage)


@flow(name="drorae", task_runner=TASK_RUNNER, persist_result=False)
def drorae(
    recipe: str = "smoke",
    overrides: list[str] | None = None,
    only: str | None = None,
    from_stage: str | None = None,
    force: list[str] | None = None,
    workspace: str | None = None,
    jobs: int | None = None,
    retries: int = 2,
    strict_code: bool = False,
) -> dict[str, str]:
    """Take raw images to a measured generator; returns the address of every stage's output.

    Args:
        recipe: Name of the recipe.
        overrides: `section.field=value` assignments.
        only: Run this stage alone; its inputs have to be there.
        from_stage: Run this stage and those that depend on it.
        force: Stages to build even if their output is there.
        workspace: Folder or s3:// address of the outputs; by default DRORAE_WORKSPACE, else `runs`.
        jobs: Stage jobs at the same time on this machine; by default what the recipe says.
        retries: Further attempts of a stage that failed and may work the next time.
        strict_code: Build again what was built by other code.
    """
    request = Request(
        recipe=recipe,
        overrides=tuple(overrides or ()),
        workspace=workspace or default_workspace(),
        only=only,
        from_stage=from_stage,
        force=tuple(force or ()),
        strict_code=strict_code,
    )
    Workspace(request.workspace).check()
    controls = CONTROLS.get()
    plan = make_plan(request, controls.sources if controls else None)
    session = Session(plan, jobs, str(flow_run.id or ""))
    token = SESSION.set(session)
    try:
        futures = _submit(session.plan, retries)
        wait(list(futures.values()))
        _raise_first_failure(futures)
    except (StageFailed, ValueError):
        raise  # the other stages have ended
    except BaseException:
        # A cancelled run: the threads of the tasks end only when their jobs do.
        session.stop()
        raise
    finally:
        session.close()
        publish(session.plan, session.outcomes)
        SESSION.reset(token)
    return {name: outcome.uri for name, outcome in session.outcomes.items()}


def _submit(plan: RunPlan, retries: int) -> dict[str, PrefectFuture]:
    """Submit one task per selected stage, waiting for the tasks of its needs."""
    futures: dict[str, PrefectFuture] = {}
    task_with_retries: Any = run_stage.with_options(retries=retries)
    for step in plan.steps:
        if step.selected:
            stage = stages.find_stage(step.stage, stages.STAGES)
            inputs = [futures[name] for name in stage.needs if name in futures]
            futures[step.stage] = task_with_retries.submit(step.stage, step.key, wait_for=inputs)
    return futures


def _raise_first_failure(futures: dict[str, PrefectFuture]) -> None:
    """Raise what ended the first stage that failed, not the stages that waited for it."""
    errors = [
        future.result(raise_on_failure=False)
        for future in futures.values()
        if not future.state.is_completed() and not future.state.is_pending()
    ]
    for error in errors:
        if isinstance(error, BaseException):
            raise error
    unfinished = [name for name, future in futures.items() if not future.state.is_completed()]
    if unfinished:
        raise RuntimeError(f"stages {unfinished} did not run; see the Prefect logs for the reason.")
