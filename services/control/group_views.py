"""The API's responses about one kept group or episode: steps, anchor states, actions, and the settings behind them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from services.control.views import GroupSummary, TrajectorySummary, View


class VersionSpanView(View):
    version: int
    tokens: int


class ToolCallView(View):
    name: str
    arguments: str
    """JSON as the policy wrote it."""


class StepView(View):
    """One step of an episode, with the numbers that it was trained with: those of its turn."""

    number: int
    turn: int | None
    """Number of its turn in the episode: calls made in one state are one turn. None: it was not trained on."""
    extends: int | None
    """Number of the step whose prompt and response begin this prompt."""
    state: int | None
    """Number of its anchor state within the group; see the group's states. None: it was not trained on."""
    observation: str
    prompt: str
    response: str
    thought: str | None
    """Text between `<think>` and `</think>`."""
    tool_calls: list[ToolCallView]
    """Of the response."""
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
    """Discounted return of its turn, minus the penalty."""
    episode_advantage: float
    step_advantage: float
    advantage: float
    step_group_size: int
    """Turns in its step group; 0 if it was not trained on."""


class TrajectoryView(View):
    """An episode as it was trained on."""

    summary: TrajectorySummary
    facts: dict[str, Any]
    started_at: float
    finished_at: float
    steps: list[StepView]


class StateStep(View):
    """One turn taken in a state."""

    member: int
    number: int
    """Number of the turn in the episode."""
    calls: list[int]
    """Numbers of its steps."""
    action: str
    """What its last call did."""
    valid: bool
    reward: float
    """Sum over its steps."""
    return_: Annotated[float, Field(serialization_alias="return", validation_alias="return")]
    episode_advantage: float
    step_advantage: float
    advantage: float


class StateView(View):
    """An anchor state of a group and its step group: the turns taken there."""

    state: int
    layer: int
    """Number of the turn before which an episode first reached the state."""
    anchor: str
    observation: str
    mean_return: float
    deviation: float
    """Standard deviation of the returns (ddof 1); 0 for a lone turn."""
    steps: list[StateStep]


class EdgeView(View):
    """An action that leads from one state to another."""

    source: int
    target: int | None
    """None: the episode ended."""
    outcome: Literal["won", "lost"] | None
    action: str
    count: int
    step_advantage: float
    """Mean over the turns."""
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
    penalty: str
    similarity: float | None
    group_baseline: bool


class FormulaLine(View):
    level: Literal["episode", "step", "total"]
    formula: str
    """Plain text; `_` begins a subscript, of one character or in braces."""
    meaning: str


class Term(View):
    term: str
    meaning: str


class AlgorithmView(View):
    """The estimator's description of itself, with the run's settings filled in."""

    title: str
    paper: str
    step_level: bool
    """Whether it compares actions taken in the same state."""
    formulas: list[FormulaLine]
    terms: list[Term]


class GroupView(View):
    """One group in detail: its episodes, its anchor states, and the actions between them."""

    summary: GroupSummary
    formula: Formula | None
    """None: the run's configuration cannot be read by this version."""
    algorithm: AlgorithmView | None
    """None: the run's folder has no readable description."""
    trajectories: list[TrajectorySummary]
    states: list[StateView]
    edges: list[EdgeView]


class ComparedEstimator(View):
    """An estimator beside the one that the group was trained with."""

    name: str
    correlation: float | None
    """Pearson's, with the advantages that it was trained with, over the group's turns. None: one does not vary."""
    opposite: int
    """Turns to which it gives the other sign."""
    deviation: float
    """Standard deviation of its advantages."""


class ComparedTurn(View):
    """One turn with the advantage that every estimator gives it."""

    member: int
    number: int
    state: int
    action: str
    recorded: float
    """What it was trained with."""
    advantages: list[float]
    """In the order of the estimators."""


class ComparisonView(View):
    """One group by every estimator, with the run's settings and what each algorithm's preset sets of them."""

    group: int
    algorithm: str
    """Of the run."""
    estimators: list[ComparedEstimator]
    deviation: float
    """Standard deviation of the advantages that the group was trained with."""
    correlations: list[list[float | None]]
    """Pearson's, of each estimator with each."""
    turns: list[ComparedTurn]
