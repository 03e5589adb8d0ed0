"""Routes that look: runs and all that is known of them. Every one needs a token where one is set."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request

from services.archive import ArchiveDamaged, GroupEntry
from services.control import environments, explorer
from services.control import run_views as answers
from services.control.access import Gate, Reader, caller
from services.control.audit import Audit
from services.control.group_views import GroupView, TrajectoryView
from services.control.problems import describe
from services.control.runs import NAME_PATTERN, Run, Runs
from services.control.views import (
    ActorList,
    AuditList,
    BufferView,
    CheckpointList,
    CommandList,
    ConfigView,
    EnvironmentList,
    GroupList,
    GroupSummary,
    HistogramList,
    Identity,
    LeaseList,
    MetricsView,
    RunList,
    RunView,
    TrajectoryList,
)

MOST_RECORDS = 20_000

REFUSALS = describe(400, 401, 422, 429)
RUN_REFUSALS = describe(404)

router = APIRouter(prefix="/api/v1", dependencies=[Depends(caller)], responses=REFUSALS)


def find_run(
    request: Request,
    run: Annotated[str, Path(pattern=NAME_PATTERN, description="Name of the run's folder.")],
) -> Run:
    runs: Runs = request.app.state.runs
    found = runs.find(run)
    if found is None:
        raise HTTPException(404, "there is no such run")
    return found


OneRun = Annotated[Run, Depends(find_run)]
Offset = Annotated[int, Query(ge=0, le=10**9, description="Leave out so many.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="At most so many.")]
Last = Annotated[int, Query(ge=1, le=2000, description="Of the newest so many updates.")]
Number = Annotated[int, Path(ge=0, le=10**12)]
AskedNumber = Annotated[int | None, Query(ge=0, le=10**12)]
TaskType = Annotated[str | None, Query(max_length=200)]


@router.get("/me")
def me(request: Request, who: Reader) -> Identity:
    """Who the server takes the caller for."""
    gate: Gate = request.app.state.gate
    return Identity(role=who.role.value, open=gate.open)


@router.get("/runs")
def list_runs(request: Request) -> RunList:
    """All runs, by name."""
    runs: Runs = request.app.state.runs
    return RunList(runs=[run.view() for run in runs.all()])


@router.get("/runs/{run}", responses=RUN_REFUSALS)
def status(run: OneRun) -> RunView:
    """One run in short."""
    return run.view()


@router.get("/runs/{run}/config", responses=RUN_REFUSALS)
def config(run: OneRun) -> ConfigView:
    """The run's configuration tree."""
    return ConfigView(config=run.shown_config())


@router.get("/runs/{run}/metrics", responses=RUN_REFUSALS)
def metrics(
    run: OneRun,
    after: Annotated[int, Query(ge=0, le=10**9, description="Leave out the first so many records.")] = 0,
    limit: Annotated[int, Query(ge=1, le=MOST_RECORDS)] = 5000,
    name: Annotated[list[str] | None, Query(max_length=100, description="Only these numbers of each record.")] = None,
) -> MetricsView:
    """Records of the metrics stream over time: updates and evaluations."""
    return answers.metrics(run, after, limit, None if name is None else frozenset(name))


@router.get("/runs/{run}/actors", responses=RUN_REFUSALS)
def actors(run: OneRun) -> ActorList:
    """Rollout actors by their last heartbeat."""
    return answers.actors(run)


@router.get("/runs/{run}/environments", responses=RUN_REFUSALS)
def list_environments(run: OneRun) -> EnvironmentList:
    """Environment servers, asked now."""
    if run.snapshot() is None:
        return EnvironmentList(environments=[])
    return EnvironmentList(environments=environments.ask_all(environments.addresses(run)))


@router.get("/runs/{run}/buffer", responses=RUN_REFUSALS)
def buffer(run: OneRun) -> BufferView:
    """Tickets and groups in Redis."""
    return answers.buffer(run)


@router.get("/runs/{run}/leases", responses=RUN_REFUSALS | describe(409))
def leases(run: OneRun) -> LeaseList:
    """Tickets that are being played: by whom, and for how long they are theirs."""
    return answers.leases(run)


@router.get("/runs/{run}/staleness", responses=RUN_REFUSALS)
def staleness(run: OneRun, last: Last = 200) -> HistogramList:
    """Groups by their age, in updates, when they were trained on."""
    return answers.staleness(run, last)


@router.get("/runs/{run}/step-groups", responses=RUN_REFUSALS)
def step_groups(run: OneRun, last: Last = 200) -> HistogramList:
    """Step groups by their size, of the updates whose groups are kept."""
    return answers.step_group_sizes(run, last)


@router.get("/runs/{run}/groups", responses=RUN_REFUSALS)
def groups(
    run: OneRun,
    offset: Offset = 0,
    limit: Limit = 100,
    update: AskedNumber = None,
    task_type: TaskType = None,
    success: Annotated[Literal["all", "some", "none"] | None, Query(description="How many episodes won.")] = None,
) -> GroupList:
    """Groups that were trained on and are kept, newest update first."""
    return answers.groups(run, offset=offset, limit=limit, update=update, task_type=task_type, success=success)


@router.get("/runs/{run}/groups/{group}", responses=RUN_REFUSALS | describe(410))
def group_detail(run: OneRun, group: Number) -> GroupView:
    """A group taken apart: its episodes, its anchor states with their step groups, and the actions between them."""
    path, summary, entry = _find_group(run, group)
    try:
        return explorer.group_view(path, summary, entry, run.config, explorer.algorithm(run.folder))
    except OSError:
        raise HTTPException(410, GONE) from None


@router.get("/runs/{run}/trajectories", responses=RUN_REFUSALS)
def trajectories(
    run: OneRun,
    offset: Offset = 0,
    limit: Limit = 100,
    group: AskedNumber = None,
    task_type: TaskType = None,
    won: bool | None = None,
    version: Annotated[
        int | None, Query(ge=0, le=10**12, description="A policy version that wrote part of it.")
    ] = None,
) -> TrajectoryList:
    """Episodes that were trained on and are kept, newest update first."""
    return answers.trajectories(
        run, offset=offset, limit=limit, group=group, task_type=task_type, won=won, version=version
    )


@router.get("/runs/{run}/trajectories/{group}/{member}", responses=RUN_REFUSALS | describe(410))
def trajectory(run: OneRun, group: Number, member: Number) -> TrajectoryView:
    """One episode, step by step, with what each step was trained with."""
    path, summary, entry = _find_group(run, group)
    found = next((candidate for candidate in entry.members if candidate.member == member), None)
    if found is None:
        raise HTTPException(404, "the group has no such episode")
    try:
        return explorer.trajectory_view(path, summary, entry, found)
    except OSError:
        raise HTTPException(410, GONE) from None


@router.get("/runs/{run}/checkpoints", responses=RUN_REFUSALS)
def checkpoints(run: OneRun) -> CheckpointList:
    """Complete checkpoints, oldest first."""
    return CheckpointList(checkpoints=run.checkpoints())


@router.get("/runs/{run}/commands", responses=RUN_REFUSALS)
def commands(run: OneRun) -> CommandList:
    """What was asked of the run and what came of it, newest first; forgotten when its Redis is."""
    return answers.commands(run)


@router.get("/runs/{run}/audit", responses=RUN_REFUSALS)
def audit(run: OneRun, limit: Limit = 200) -> AuditList:
    """The newest lines of the audit log, oldest first."""
    return AuditList(entries=Audit(run.folder).entries(limit))


GONE = "the group is no longer kept: the oldest leave when there are too many"


def _find_group(run: Run, group: int) -> tuple[FilePath, GroupSummary, GroupEntry]:
    try:
        found = run.kept.find(group)
    except (OSError, StopIteration):
        raise HTTPException(410, GONE) from None
    except ArchiveDamaged as error:
        raise HTTPException(410, str(error)) from None
    if found is None:
        raise HTTPException(404, "no such group is kept")
    return found
