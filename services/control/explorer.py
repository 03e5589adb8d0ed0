"""A kept group in detail: anchor states as nodes, actions as edges, episodes step by step.

Invariants
- Every number is one that the learner trained with, or a count, mean or deviation of those.
- States are numbered from 0 in the order of their first appearance in the group.
- A turn counts once, however many calls it took: in states, step groups and edges.

Example, two episodes of three steps, by anchor: `A B A` (lost) and `A C C` (won). States are A = 0, B = 1 and C = 2.
Step groups, as episode.step: {1.1, 1.3, 2.1}, {1.2} and {2.2, 2.3}. Edges: A→B, B→A, A→lost, A→C, C→C and C→won.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from services.archive import GroupEntry, MemberEntry, StepNumbers, numbers_of, read_trajectory
from services.config.tree import Config
from services.control.group_index import episode_summary
from services.control.group_views import (
    AlgorithmView,
    EdgeView,
    Formula,
    GroupView,
    StateStep,
    StateView,
    StepView,
    ToolCallView,
    TrajectoryView,
    VersionSpanView,
)
from services.control.views import GroupSummary
from services.run_folder import ALGORITHM_NAME
from services.schemas import Step, Trajectory
from services.turns import turns_of

_TOOL_CALLS = TypeAdapter(list[ToolCallView])
_THOUGHT = re.compile(r"<think>(.*?)(?:</think>|$)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Row:
    """One turn of the group.

    Attributes:
        member: number of the episode in the group, from 0.
        number: number of the turn in the episode, from 0.
        calls: numbers of its steps.
        state: number of its anchor state.
        opening: its first call, made in that state.
        action: what its last call did.
        reward: sum over its steps.
        valid: whether all its calls are valid.
        return_: discounted return.
        episode, level, total: the advantages A_E, A_S and A.
    """

    member: int
    number: int
    calls: list[int]
    state: int
    opening: Step
    action: str
    reward: float
    valid: bool
    return_: float
    episode: float
    level: float
    total: float


def formula(config: Config | None) -> Formula | None:
    """The settings behind a run's advantages."""
    if config is None:
        return None
    return Formula(algorithm=config.algorithm, **config.advantage.model_dump())


def algorithm(folder: Path) -> AlgorithmView | None:
    """What the estimator of the run in `folder` says of itself."""
    try:
        return AlgorithmView.model_validate_json((folder / ALGORITHM_NAME).read_bytes())
    except (OSError, ValidationError):
        return None


def group_view(
    path: Path, summary: GroupSummary, entry: GroupEntry, config: Config | None, described: AlgorithmView | None = None
) -> GroupView:
    """The group in detail. Raises what `services.archive.read_trajectory` raises."""
    episodes = [(member, read_trajectory(path, member)) for member in entry.members]
    rows = _rows(entry, [trajectory for _, trajectory in episodes])
    return GroupView(
        summary=summary,
        formula=formula(config),
        algorithm=described,
        trajectories=[episode_summary(summary, member) for member in entry.members],
        states=_states(rows),
        edges=_edges(rows, {member.member: member.won for member in entry.members}),
    )


def trajectory_view(path: Path, summary: GroupSummary, entry: GroupEntry, member: MemberEntry) -> TrajectoryView:
    """One episode in detail. Raises what `services.archive.read_trajectory` raises."""
    trajectory = read_trajectory(path, member)
    numbers, states = numbers_of(member), state_numbers(entry)
    all_numbers = [numbers_of(other) for other in entry.members]
    sizes = Counter(np.concatenate([own.step_group[own.first_calls] for own in all_numbers]).tolist())
    return TrajectoryView(
        summary=episode_summary(summary, member),
        facts=_plain(trajectory.facts),
        started_at=trajectory.started_at,
        finished_at=trajectory.finished_at,
        steps=[_step_view(number, step, numbers, states, sizes) for number, step in enumerate(trajectory.steps)],
    )


def _step_view(
    number: int, step: Step, numbers: StepNumbers, states: Mapping[int, int], sizes: Mapping[int, int]
) -> StepView:
    thought = _THOUGHT.search(step.response)
    logprobs = step.logprobs
    turn, step_group = int(numbers.turns[number]), int(numbers.step_group[number])
    return StepView(
        number=number,
        turn=turn if turn >= 0 else None,
        extends=step.extends if step.extends >= 0 else None,
        state=states.get(step_group),
        observation=step.observation,
        prompt=step.prompt,
        response=step.response,
        thought=thought.group(1).strip() if thought else None,
        tool_calls=_tool_calls(step.tool_calls),
        action=step.action,
        reward=_finite(step.reward),
        valid=step.valid,
        terminated=step.terminated,
        truncated=step.truncated,
        versions=[VersionSpanView(version=span.version, tokens=span.tokens) for span in step.versions],
        prompt_tokens=len(step.prompt_ids),
        response_tokens=len(step.response_ids),
        mean_logprob=_finite(float(logprobs.mean())) if len(logprobs) else None,
        **{"return": _finite(numbers.returns[number])},
        episode_advantage=_finite(numbers.episode[number]),
        step_advantage=_finite(numbers.step[number]),
        advantage=_finite(numbers.total[number]),
        step_group_size=sizes.get(step_group, 0),
    )


def _tool_calls(text: str) -> list[ToolCallView]:
    """The tool calls of a response; none if the text is not what an actor stores."""
    try:
        return _TOOL_CALLS.validate_json(text) if text else []
    except ValidationError:
        return []


def state_numbers(entry: GroupEntry) -> dict[int, int]:
    """The number of a state in this group, by the step group's id in the update."""
    states: dict[int, int] = {}
    for member in entry.members:
        numbers = numbers_of(member)
        for identity in numbers.step_group[numbers.first_calls].tolist():
            states.setdefault(identity, len(states))
    return states


def _rows(entry: GroupEntry, trajectories: Sequence[Trajectory]) -> list[_Row]:
    states = state_numbers(entry)
    rows = []
    for member, trajectory in zip(entry.members, trajectories, strict=True):
        numbers, turns = numbers_of(member), turns_of(trajectory.steps)
        calls: dict[int, list[int]] = defaultdict(list)
        for call, number in enumerate(numbers.turns.tolist()):
            calls[number].append(call)
        for number, first in enumerate(numbers.first_calls.tolist()):
            rows.append(
                _Row(
                    member.member,
                    number,
                    calls[number],
                    states[int(numbers.step_group[first])],
                    trajectory.steps[first],
                    trajectory.steps[calls[number][-1]].action,
                    _finite(turns.reward[number]),
                    turns.valid[number],
                    _finite(numbers.returns[first]),
                    _finite(numbers.episode[first]),
                    _finite(numbers.step[first]),
                    _finite(numbers.total[first]),
                )
            )
    return rows


def _states(rows: Sequence[_Row]) -> list[StateView]:
    of_state: dict[int, list[_Row]] = defaultdict(list)
    for row in rows:
        of_state[row.state].append(row)
    return [_state(state, of_state[state]) for state in sorted(of_state)]


def _state(state: int, rows: Sequence[_Row]) -> StateView:
    returns = np.array([row.return_ for row in rows])
    return StateView(
        state=state,
        layer=min(row.number for row in rows),
        anchor=rows[0].opening.anchor,
        observation=rows[0].opening.observation,
        mean_return=float(returns.mean()),
        deviation=float(returns.std(ddof=1)) if len(rows) > 1 else 0.0,
        steps=[
            StateStep(
                member=row.member,
                number=row.number,
                calls=row.calls,
                action=row.action,
                valid=row.valid,
                reward=row.reward,
                **{"return": row.return_},
                episode_advantage=row.episode,
                step_advantage=row.level,
                advantage=row.total,
            )
            for row in rows
        ],
    )


def _edges(rows: Sequence[_Row], won: dict[int, bool]) -> list[EdgeView]:
    """Actions from state to state. `rows` are sorted by member and turn."""
    taken: dict[tuple[int, int, str, str], list[_Row]] = defaultdict(list)
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        goes_on = after is not None and after.member == row.member
        outcome = "" if goes_on else "won" if won[row.member] else "lost"
        taken[row.state, after.state if goes_on and after is not None else -1, row.action, outcome].append(row)
    return [
        EdgeView(
            source=source,
            target=target if target >= 0 else None,
            outcome=outcome or None,
            action=action,
            count=len(found),
            step_advantage=sum(row.level for row in found) / len(found),
            advantage=sum(row.total for row in found) / len(found),
            members=sorted({row.member for row in found}),
        )
        for (source, target, action, outcome), found in taken.items()
    ]


def _finite(value: float) -> float:
    """The value, or 0 if it is not finite: JSON has no NaN and no infinities."""
    return float(value) if math.isfinite(value) else 0.0


def _plain(facts: Any) -> dict[str, Any]:
    return {
        str(name): None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in facts.items()
    }
