"""The API's views of a run, made from its snapshot, its files and its archive."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, TypeVar

from pydantic import ValidationError

from services.buffer import Heartbeat
from services.config.masking import masked
from services.control.runs import Run
from services.control.views import (
    ActorList,
    ActorView,
    AgentsView,
    BufferView,
    CommandList,
    GroupList,
    GroupSummary,
    Histogram,
    HistogramList,
    LeaseList,
    LeaseView,
    MetricsView,
    StreamView,
    TrajectoryList,
    WarningList,
    WarningView,
)

HEARTBEAT_S = 10.0
MAX_WARNINGS = 100
LISTED_ACTORS = 100
LISTED_LEASES = 500
"""Number of entries of a list if the caller requests no other: a page shows no more, however large the run is."""

_T = TypeVar("_T")


def metrics(run: Run, after: int, limit: int, names: frozenset[str] | None) -> MetricsView:
    """At most `limit` records from number `after`. `names`: the numbers to return; None: all."""
    records, generation = run.metrics.reading()
    found = records[after : after + limit]
    if names is not None:
        wanted = names | {"step", "time"}
        found = [{name: value for name, value in record.items() if name in wanted} for record in found]
    return MetricsView(records=found, next=min(after, len(records)) + len(found), generation=generation)


def actors(run: Run, offset: int = 0, limit: int = LISTED_ACTORS) -> ActorList:
    """At most `limit` actors from number `offset` by name, and sums over all."""
    snapshot = run.snapshot()
    if snapshot is None:
        return ActorList(live=False, wanted=None, heartbeat_s=HEARTBEAT_S, actors=[])
    beats = snapshot.actors
    return ActorList(
        live=True,
        wanted=snapshot.wanted_actors,
        heartbeat_s=HEARTBEAT_S,
        total=len(beats),
        episodes=sum(_typed(beat.facts, "episodes", int) or 0 for beat in beats.values()),
        tokens_per_s=sum(_number(beat.facts, "tokens_per_s") or 0.0 for beat in beats.values()),
        actors=[_actor(name, beats[name]) for name in sorted(beats)[offset : offset + limit]],
    )


def buffer(run: Run) -> BufferView:
    snapshot = run.snapshot()
    if snapshot is None:
        return BufferView(live=False)
    stats = snapshot.stats
    streams = [
        StreamView(stream=name, open=counts.open, complete=counts.complete, cancelled=counts.cancelled)
        for name, counts in stats.streams.items()
    ]
    return BufferView(
        live=True,
        queued=stats.queued,
        leased=stats.leased,
        streams=streams,
        complete_groups=snapshot.complete,
        cancelled_groups={str(group): masked(reason) for group, reason in snapshot.cancelled.items()},
        trajectory_bytes=stats.trajectory_bytes,
        cap_bytes=stats.cap_bytes,
        full=stats.full,
    )


def leases(run: Run, limit: int = LISTED_LEASES) -> LeaseList:
    """The `limit` leases that expire first, sorted by holder and remaining time. Raises RedisUnavailable."""
    buffer = run.live.buffer() if run.live is not None else None
    found, total = ([], 0) if buffer is None else buffer.leases(limit)
    views = [LeaseView(**asdict(lease)) for lease in found]
    return LeaseList(total=total, leases=sorted(views, key=lambda view: (view.holder, view.left_s)))


def commands(run: Run) -> CommandList:
    """All commands, newest first."""
    snapshot = run.snapshot()
    return CommandList(commands=[] if snapshot is None else list(reversed(snapshot.commands)))


def warnings(run: Run) -> WarningList:
    """The newest `MAX_WARNINGS` warnings of the training signal, newest first. Invalid lines are left out."""
    found = []
    for record in reversed(run.warnings.records()):
        with contextlib.suppress(ValidationError):
            found.append(WarningView.model_validate(record))
    return WarningList(warnings=found[:MAX_WARNINGS])


def staleness(run: Run, last: int) -> HistogramList:
    """Number of groups by staleness, for each of the newest `last` updates.

    A group's staleness is the number of updates between its oldest token and its use. Example: update 7 trains on
    groups whose oldest tokens are of versions 6, 6 and 4; its counts are {"0": 2, "2": 1}.
    """
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    for entry in run.ledger.records():
        update, versions = entry.get("update"), entry.get("versions")
        if isinstance(update, int) and isinstance(versions, list):
            oldest = min((version for member in versions for version in member), default=update - 1)
            counts[update][str(max(0, update - 1 - oldest))] += 1
    newest = sorted(counts)[-last:]
    return HistogramList(updates=[Histogram(update=update, counts=dict(counts[update])) for update in newest])


def step_group_sizes(run: Run, last: int) -> HistogramList:
    """Number of step groups by size, for each of the newest `last` kept updates."""
    return HistogramList(
        updates=[
            Histogram(update=update, counts={str(size): count for size, count in sizes.items()})
            for update, sizes in run.groups.step_group_sizes(last)
        ]
    )


def groups(
    run: Run, *, offset: int, limit: int, update: int | None, task_type: str | None, success: str | None
) -> GroupList:
    """Kept groups that match, newest update first. `success`: `all`, `some` or `none` of the episodes won."""
    rows = [group for group, _ in run.groups.rows()]
    found = [
        group
        for group in rows
        if (update is None or group.update == update)
        and (task_type is None or group.task_type == task_type)
        and (success is None or success == _success(group))
    ]
    types, first, last = _span(rows)
    return GroupList(
        groups=found[offset : offset + limit], total=len(found), task_types=types, first_update=first, last_update=last
    )


def trajectories(
    run: Run,
    *,
    offset: int,
    limit: int,
    group: int | None,
    task_type: str | None,
    won: bool | None,
    version: int | None,
) -> TrajectoryList:
    """Kept episodes that match, newest update first. `version`: a policy version that sampled part of the episode."""
    rows = list(run.groups.rows())
    found = [
        episode
        for _, episodes in rows
        for episode in episodes
        if (group is None or episode.group == group)
        and (task_type is None or episode.task_type == task_type)
        and (won is None or episode.won == won)
        and (version is None or episode.oldest_version <= version <= episode.newest_version)
    ]
    types, first, last = _span(summary for summary, _ in rows)
    return TrajectoryList(
        trajectories=found[offset : offset + limit],
        total=len(found),
        task_types=types,
        first_update=first,
        last_update=last,
    )


def _span(groups: Iterable[GroupSummary]) -> tuple[list[str], int | None, int | None]:
    """Task types, first and last update of some groups."""
    types, updates = set(), []
    for group in groups:
        types.add(group.task_type)
        updates.append(group.update)
    return sorted(types), min(updates, default=None), max(updates, default=None)


def _success(group: GroupSummary) -> str:
    return "all" if group.won == group.episodes else "none" if group.won == 0 else "some"


def _actor(name: str, beat: Heartbeat) -> ActorView:
    facts = beat.facts
    return ActorView(
        name=name,
        state=str(facts.get("state", "")),
        version=_typed(facts, "version", int),
        episodes=_typed(facts, "episodes", int),
        tokens_per_s=_number(facts, "tokens_per_s"),
        kv_use=_number(facts, "kv_use"),
        stored=_typed(facts, "stored", int),
        failed=_typed(facts, "failed", int),
        abandoned=_typed(facts, "abandoned", int),
        agents=_agents(facts),
        host=str(facts.get("host", "")),
        heard_s=beat.heard_s,
        facts=facts,
    )


def _agents(facts: dict[str, Any]) -> AgentsView | None:
    try:
        return AgentsView.model_validate(facts["agents"]) if "agents" in facts else None
    except ValidationError:
        return None


def _typed(facts: dict[str, Any], name: str, kind: type[_T]) -> _T | None:
    value = facts.get(name)
    return value if isinstance(value, kind) else None


def _number(facts: dict[str, Any], name: str) -> float | None:
    value = facts.get(name)
    return float(value) if isinstance(value, int | float) else None
