"""The models of the API's responses. Plain data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from services.archive import EpisodeSummary
from services.buffer.commands import Command
from services.schemas import Task


class View(BaseModel):
    """Base of all responses: attribute docstrings become the descriptions of the OpenAPI document."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Identity(View):
    """The caller's role."""

    role: Literal["read", "admin"]
    open: bool
    """No token is required."""


class RunView(View):
    """Summary of one run."""

    name: str
    algorithm: str | None
    env: str | None
    live: bool
    """Its Redis responds. Otherwise everything shown is from the run's folder."""
    state: str
    """`running`, `paused`, `stopping`; `ended` when the run is not live."""
    note: str
    """Where the data shown come from, in one line."""
    update: int
    """Completed updates."""
    updates: int | None
    """Requested updates."""
    success: float | None
    """Success rate of the newest training episodes."""
    evaluation: float | None
    """Success rate of the newest evaluation."""
    changed_at: float | None
    """Unix seconds of the newest record."""


class RunList(View):
    runs: list[RunView]


class ConfigView(View):
    """The run's configuration tree, without credentials."""

    config: dict[str, Any]


class MetricsView(View):
    """Records of the metrics stream, oldest first: `step` (update), `time` (Unix seconds) and named numbers."""

    records: list[dict[str, Any]]
    next: int
    """Pass this as `after` to get later records."""
    generation: int
    """Generation of the records. If it changes (a resumed run), start again from 0."""


class AgentsView(View):
    """The agent programs of a rollout actor."""

    gateway: str | None
    """Its URL; none: it does not listen yet."""
    playing: int
    """Episodes that agents play now."""
    waiting: int
    """Requests of services for an episode."""
    processes: int
    """Agent processes."""
    calls_per_s: float
    extended_fraction: float | None
    """Share of the calls in going conversations whose prompt continues an earlier call."""
    calls_per_turn: float | None
    short_anchor_fraction: float | None
    """Share of turns in whose state the policy was told little: such states may be taken for one another."""
    template: list[str]
    """What is known of the chat template, a line each."""


class ActorView(View):
    """One rollout actor, by its last heartbeat."""

    name: str
    state: str
    version: int | None
    episodes: int | None
    tokens_per_s: float | None
    kv_use: float | None
    """Used share of the KV cache, if the actor reports it."""
    stored: int | None
    failed: int | None
    abandoned: int | None
    agents: AgentsView | None = None
    """Of an actor whose episodes an agent program plays."""
    host: str
    heard_s: float
    """Seconds since that heartbeat, by the clock of Redis."""
    facts: dict[str, Any]
    """The complete heartbeat."""


class ActorList(View):
    live: bool
    wanted: int | None
    """Number of rollout actors requested by `scale`; none: not requested."""
    heartbeat_s: float
    """An actor without a heartbeat for this long is no longer listed."""
    total: int = 0
    """Number of live actors; `actors` is a part of them, by name."""
    episodes: int = 0
    """Episodes that all of them play now."""
    tokens_per_s: float = 0.0
    """Response tokens a second of all of them."""
    actors: list[ActorView]


class StreamView(View):
    stream: str
    open: int
    complete: int
    cancelled: int


class LeaseView(View):
    """A ticket that an actor is playing."""

    holder: str
    stream: str
    group: int
    member: int
    left_s: float
    """Seconds until the ticket goes to another actor, unless the lease is renewed; negative: about to."""
    attempts: int
    """Failed attempts so far."""


class LeaseList(View):
    total: int = 0
    """Number of leases; `leases` are the first of them to expire."""
    leases: list[LeaseView]


class BufferView(View):
    """Tickets and groups in Redis."""

    live: bool
    queued: int = 0
    leased: int = 0
    streams: list[StreamView] = []
    complete_groups: list[int] = []
    """The first complete training groups, which wait to be trained on or acknowledged; `streams` counts all."""
    cancelled_groups: dict[str, str] = {}
    """Some of the cancelled training groups and the reasons; `streams` counts all."""
    trajectory_bytes: int = 0
    cap_bytes: int = 0
    full: bool = False


class Histogram(View):
    """Counts of integers for one update."""

    update: int
    counts: dict[str, int]


class HistogramList(View):
    updates: list[Histogram]


class EnvironmentView(View):
    """The state of an environment server now."""

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


class WarningView(View):
    """A warning about the training signal."""

    update: int
    """The update that it was given after."""
    name: str
    """Kind of the warning; each kind is given once in a run."""
    text: str
    """What was seen, and the likely cause."""


class WarningList(View):
    warnings: list[WarningView]
    """Newest first."""


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
    """Calls of the policy."""
    turns: int
    """Steps of the environment: calls made in one state are one turn."""
    step_groups: int
    largest_step_group: int
    """Turns in the largest."""
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
    turns: int
    """Steps of the environment: calls made in one state are one turn."""
    episode_advantage: float
    """A_E of its first turn; a later turn's differs when its action was invalid."""


class TrajectoryList(View):
    trajectories: list[TrajectorySummary]
    total: int
    task_types: list[str]
    first_update: int | None
    last_update: int | None


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
