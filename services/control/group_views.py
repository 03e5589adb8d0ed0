"""What the API answers about one kept group or episode: steps, anchor states, actions, and the settings behind them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from services.control.views import GroupSummary, TrajectorySummary, View


class VersionSpanView(View):
    version: int
    tokens: int


class StepView(View):
    """One step of an episode, with the numbers it was trained with."""

    number: int
    state: int
    """Its anchor state, numbered within the group; see the group's states."""
    observation: str
    prompt: str
    response: str
    thought: str | None
    """What stood between `<think>` and `</think>`."""
    action: str
    reward: float
    valid: bool
    terminated: bool
    truncated: bool
    versions: list[VersionSpanView]
    prompt_tokens: int
    response_tokens: int
    mean_logprob: float | None
    return_: Annotated[float, Field(serialization_alias="return", validation_alias="return")]
    """Discounted return, the penalty subtracted."""
    episode_advantage: float
    step_advantage: float
    advantage: float
    step_group_size: int


class TrajectoryView(View):
    """An episode as it was trained on."""

    summary: TrajectorySummary
    facts: dict[str, Any]
    started_at: float
    finished_at: float
    steps: list[StepView]


class StateStep(View):
    """One step that was taken in a state."""

    member: int
    number: int
    action: str
    valid: bool
    reward: float
    return_: Annotated[float, Field(serialization_alias="return", validation_alias="return")]
    episode_advantage: float
    step_advantage: float
    advantage: float


class StateView(View):
    """An anchor state of a group, and its step group: the steps that were taken there."""

    state: int
    layer: int
    """Step number at which an episode first came here."""
    anchor: str
    observation: str
    mean_return: float
    deviation: float
    """Standard deviation of the returns (ddof 1); 0 for a lone step."""
    steps: list[StateStep]


class EdgeView(View):
    """An action that led from one state to another."""

    source: int
    target: int | None
    """None: the episode ended."""
    outcome: Literal["won", "lost"] | None
    action: str
    count: int
    step_advantage: float
    """Mean over the steps."""
    advantage: float
    members: list[int]


class Formula(View):
    """The settings behind the numbers."""

    algorithm: str
    gamma: float
    omega: float
    normalisation: str
    episode_statistics: str
    invalid_action_penalty: float
    similarity: float | None
    group_baseline: bool


class GroupView(View):
    """A group taken apart: its episodes, its anchor states, and the actions between them."""

    summary: GroupSummary
    formula: Formula | None
    """None: the run's configuration cannot be read by this version."""
    trajectories: list[TrajectorySummary]
    states: list[StateView]
    edges: list[EdgeView]
