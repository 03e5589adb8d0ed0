"""What the API answers: one model a thing that people look at. Plain data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from services.archive import EpisodeSummary
from services.buffer.commands import Command
from services.schemas import Task


class View(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class Identity(View):
    """Who the server takes the caller for."""

    role: Literal["read", "admin"]
    open: bool
    """No token is asked for."""


class RunView(View):
    """One run in short."""

    name: str
    algorithm: str | None
    env: str | None
    live: bool
    """Its Redis answers. Otherwise everything shown is from the run's folder."""
    state: str
    """`running`, `paused`, `stopping`; `ended` when the run is not live."""
    note: str
    """What is shown and what not, in one line."""
    update: int
    """Updates done."""
    updates: int | None
    """Updates asked for."""
    success: float | None
    """Success rate of the newest training episodes."""
    evaluation: float | None
    """Success rate of the newest evaluation."""
    changed_at: float | None
    """Unix seconds of the newest record."""


class RunList(View):
    runs: list[RunView]


class ConfigView(View):
    """The run's configuration tree, secrets in addresses left out."""

    config: dict[str, Any]


class MetricsView(View):
    """Records of the metrics stream, oldest first: `step` (update), `time` (Unix seconds) and named numbers."""

    records: list[dict[str, Any]]
    next: int
    """Give this as `after` to get what comes later."""
    generation: int
    """Counts how often the stream was rewritten (a resumed run): when it changes, start again from 0."""


class ActorView(View):
    """One rollout actor by its last heartbeat."""

    name: str
    state: str
    version: int | None
    episodes: int | None
    tokens_per_s: float | None
    kv_use: float | None
    """Share of the KV cache in use, where the actor tells."""
    stored: int | None
    failed: int | None
    abandoned: int | None
    host: str
    facts: dict[str, Any]
    """All that the heartbeat said."""


class ActorList(View):
    live: bool
    wanted: int | None
    """Rollout actors that were asked for by `scale`; none: nobody asked."""
    heartbeat_s: float
    """An actor not heard of for this long is no longer listed."""
    actors: list[ActorView]


class StreamView(View):
    stream: str
    open: int
    complete: int
    cancelled: int


class BufferView(View):
    """Tickets and groups in Redis."""

    live: bool
    queued: int = 0
    leased: int = 0
    streams: list[StreamView] = []
    complete_groups: list[int] = []
    """Training groups that are complete and wait to be trained on or acknowledged."""
    cancelled_groups: dict[str, str] = {}
    """Cancelled training groups and why."""
    trajectory_bytes: int = 0
    cap_bytes: int = 0
    full: bool = False


class Histogram(View):
    """Counts of whole numbers, by update."""

    update: int
    counts: dict[str, int]


class HistogramList(View):
    updates: list[Histogram]


class EnvironmentView(View):
    """An environment server as it answers now."""

    url: str
    reachable: bool
    detail: str
    name: str | None = None
    splits: dict[str, int] = {}
    sessions: float | None = None
    steps: float | None = None
    faults: float | None = None


class EnvironmentList(View):
    environments: list[EnvironmentView]


class CheckpointView(View):
    version: int
    bytes: int
    written_at: float
    training_seconds: float | None


class CheckpointList(View):
    checkpoints: list[CheckpointView]


class GroupSummary(View):
    """A group that was trained on."""

    group: int
    update: int
    """The policy update that trained on it."""
    task: Task
    task_type: str
    episodes: int
    won: int
    mean_reward: float
    steps: int
    step_groups: int
    largest_step_group: int
    staleness: int
    oldest_version: int
    newest_version: int


class GroupList(View):
    groups: list[GroupSummary]
    total: int
    task_types: list[str]
    first_update: int | None
    last_update: int | None


class TrajectorySummary(View, EpisodeSummary):
    """An episode that was trained on."""

    group: int
    update: int
    task: Task
    task_type: str
    episode_advantage: float
    """A_E of its first step; a later step's differs when its action was invalid."""


class TrajectoryList(View):
    trajectories: list[TrajectorySummary]
    total: int
    task_types: list[str]
    first_update: int | None
    last_update: int | None


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


class GroupView(View):
    """A group taken apart: its episodes, its anchor states, and the actions between them."""

    summary: GroupSummary
    formula: Formula | None
    """None: the run's configuration cannot be read by this version."""
    trajectories: list[TrajectorySummary]
    states: list[StateView]
    edges: list[EdgeView]


class CommandList(View):
    commands: list[Command]


class AuditEntry(View):
    """One line of the audit log."""

    at: float
    by: str
    action: str
    actors: int | None = None
    command: str | None = None
    result: str


class AuditList(View):
    entries: list[AuditEntry]
