"""Read-only routes: the runs and everything that is known of them. Each requires a token if one is set."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request

from services.archive import ArchiveDamaged, GroupEntry
from services.control import environments, explorer, run_views
from services.control.access import Authenticator, Reader, caller
from services.control.audit import Audit
from services.control.comparison import Compare, comparison_view
from services.control.group_views import ComparisonView, GroupView, TrajectoryView
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
    WarningList,
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
        raise HTTPException(404, "run not found")
    return found


OneRun = Annotated[Run, Depends(find_run)]
Offset = Annotated[int, Query(ge=0, le=10**9, description="Number of entries to skip.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="Maximum number of entries.")]
Last = Annotated[int, Query(ge=1, le=2000, description="Number of newest updates.")]
Number = Annotated[int, Path(ge=0, le=10**12)]
AskedNumber = Annotated[int | None, Query(ge=0, le=10**12)]
TaskType = Annotated[str | None, Query(max_length=200)]


@router.get("/me")
def me(request: Request, who: Reader) -> Identity:
    """The caller's role."""
    authenticator: Authenticator = request.app.state.authenticator
    return Identity(role=who.role.value, open=authenticator.open)


@router.get("/runs")
def list_runs(request: Request) -> RunList:
    """All runs, by name."""
    runs: Runs = request.app.state.runs
    return RunList(runs=[run.view() for run in runs.all()])


@router.get("/runs/{run}", responses=RUN_REFUSALS)
def status(run: OneRun) -> RunView:
    """Summary of one run."""
    return run.view()


@router.get("/runs/{run}/config", responses=RUN_REFUSALS)
def config(run: OneRun) -> ConfigView:
    """The run's configuration tree."""
    return ConfigView(config=run.shown_config())


@router.get("/runs/{run}/metrics", responses=RUN_REFUSALS)
def metrics(
    run: OneRun,
    after: Annotated[int, Query(ge=0, le=10**9, description="Number of records to skip.")] = 0,
    limit: Annotated[int, Query(ge=1, le=MOST_RECORDS)] = 5000,
    name: Annotated[
        list[str] | None, Query(max_length=100, description="Names of the numbers to return; none: all.")
    ] = None,
) -> MetricsView:
    """Records of the metrics stream over time: updates and evaluations."""
    return run_views.metrics(run, after, limit, None if name is None else frozenset(name))


@router.get("/runs/{run}/actors", responses=RUN_REFUSALS)
def actors(run: OneRun, offset: Offset = 0, limit: Limit = run_views.LISTED_ACTORS) -> ActorList:
    """Rollout actors by their last heartbeat, and sums over all of them."""
    return run_views.actors(run, offset, limit)


@router.get("/runs/{run}/environments", responses=RUN_REFUSALS)
def list_environments(run: OneRun) -> EnvironmentList:
    """Environment servers and their state now."""
    if run.snapshot() is None:
        return EnvironmentList(environments=[])
    return EnvironmentList(environments=environments.ask_all(environments.addresses(run)))


@router.get("/runs/{run}/buffer", responses=RUN_REFUSALS)
def buffer(run: OneRun) -> BufferView:
    """Tickets and groups in Redis."""
    return run_views.buffer(run)


@router.get("/runs/{run}/leases", responses=RUN_REFUSALS | describe(409))
def leases(run: OneRun, limit: Limit = run_views.LISTED_LEASES) -> LeaseList:
    """Tickets that are being played, those whose leases expire first: by which actor, and for how long."""
    return run_views.leases(run, limit)


@router.get("/runs/{run}/staleness", responses=RUN_REFUSALS)
def staleness(run: OneRun, last: Last = 200) -> HistogramList:
    """Number of groups by staleness, in updates, when they were trained on."""
    return run_views.staleness(run, last)


@router.get("/runs/{run}/step-groups", responses=RUN_REFUSALS)
def step_groups(run: OneRun, last: Last = 200) -> HistogramList:
    """Number of step groups by size, for the updates whose groups are kept."""
    return run_views.step_group_sizes(run, last)


@router.get("/runs/{run}/groups", responses=RUN_REFUSALS)
def groups(
    run: OneRun,
    offset: Offset = 0,
    limit: Limit = 100,
    update: AskedNumber = None,
    task_type: TaskType = None,
    success: Annotated[
        Literal["all", "some", "none"] | None, Query(description="Which episodes of the group won.")
    ] = None,
) -> GroupList:
    """Kept groups, which were trained on; newest update first."""
    return run_views.groups(run, offset=offset, limit=limit, update=update, task_type=task_type, success=success)


@router.get("/runs/{run}/groups/{group}", responses=RUN_REFUSALS | describe(410))
def group_detail(run: OneRun, group: Number) -> GroupView:
    """One group in detail: episodes, anchor states with their step groups, and the actions between them."""
    path, summary, entry = _find_group(run, group)
    try:
        return explorer.group_view(path, summary, entry, run.config, explorer.algorithm(run.folder))
    except OSError:
        raise HTTPException(410, GONE) from None


@router.get("/runs/{run}/groups/{group}/comparison", responses=RUN_REFUSALS | describe(409, 410))
def group_comparison(request: Request, run: OneRun, group: Number) -> ComparisonView:
    """One group by every estimator: what each would have said of its turns, beside what it was trained with."""
    compare: Compare | None = request.app.state.compare
    path, _, entry = _find_group(run, group)
    if compare is None or run.config is None:
        raise HTTPException(409, NOT_COMPARABLE)
    try:
        return comparison_view(path, entry, run.config, compare)
    except (OSError, StopIteration):
        raise HTTPException(410, GONE) from None
    except ArchiveDamaged as error:
        raise HTTPException(410, str(error)) from None


@router.get("/runs/{run}/trajectories", responses=RUN_REFUSALS)
def trajectories(
    run: OneRun,
    offset: Offset = 0,
    limit: Limit = 100,
    group: AskedNumber = None,
    task_type: TaskType = None,
    won: bool | None = None,
    version: Annotated[
        int | None, Query(ge=0, le=10**12, description="A policy version that sampled part of the episode.")
    ] = None,
) -> TrajectoryList:
    """Kept episodes, which were trained on; newest update first."""
    return run_views.trajectories(
        run, offset=offset, limit=limit, group=group, task_type=task_type, won=won, version=version
    )


@router.get("/runs/{run}/trajectories/{group}/{member}", responses=RUN_REFUSALS | describe(410))
def trajectory(run: OneRun, group: Number, member: Number) -> TrajectoryView:
    """One episode step by step, with the numbers that each step was trained with."""
    path, summary, entry = _find_group(run, group)
    found = next((candidate for candidate in entry.members if candidate.member == member), None)
    if found is None:
        raise HTTPException(404, "episode not found in the group")
    try:
        return explorer.trajectory_view(path, summary, entry, found)
    except OSError:
        raise HTTPException(410, GONE) from None


@router.get("/runs/{run}/warnings", responses=RUN_REFUSALS)
def warnings(run: OneRun) -> WarningList:
    """Warnings of the training signal, newest first: what was seen after an update, and its likely cause."""
    return run_views.warnings(run)


@router.get("/runs/{run}/checkpoints", responses=RUN_REFUSALS)
def checkpoints(run: OneRun) -> CheckpointList:
    """Complete checkpoints, oldest first."""
    return CheckpointList(checkpoints=run.checkpoints())


@router.get("/runs/{run}/commands", responses=RUN_REFUSALS)
def commands(run: OneRun) -> CommandList:
    """Requested actions and their results, newest first. They are lost with the run's Redis."""
    return run_views.commands(run)


@router.get("/runs/{run}/audit", responses=RUN_REFUSALS)
def audit(run: OneRun, limit: Limit = 200) -> AuditList:
    """The newest lines of the audit log, oldest first."""
    return AuditList(entries=Audit(run.folder).entries(limit))


NOT_COMPARABLE = "the run's configuration cannot be read by this version, or this server has no estimators"
GONE = "the group is no longer kept: the oldest are deleted (telemetry.keep_groups_mib)"


def _find_group(run: Run, group: int) -> tuple[FilePath, GroupSummary, GroupEntry]:
    try:
        found = run.groups.find(group)
    except (OSError, StopIteration):
        raise HTTPException(410, GONE) from None
    except ArchiveDamaged as error:
        raise HTTPException(410, str(error)) from None
    if found is None:
        raise HTTPException(404, "group not found: it is not kept, or was not trained on")
    return found
