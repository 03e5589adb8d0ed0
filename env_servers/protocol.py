"""The wire format of the step API: what environment servers and their clients exchange over HTTP.

Invariants
- A reset opens a session with an unguessable id. A step names `(session, step)`, where `step` numbers the actions of
  the session from 1. The server keeps its answer to the last step, so that a client may repeat it; any other number is
  a 409.
- Rewards and facts are finite numbers, and `won` is true or false. Every client and every server checks it with
  `invalid_value`, so no protocol accepts what another refuses.
- Errors are RFC 9457 problem documents (`application/problem+json`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_ACTION_CHARS = 4096
MAX_BATCH = 1024
FREE_TEXT = "<your query>"
"""Placeholder in an admissible action: any text may stand in its place."""

LARGEST_INTEGER = 2**63
SHOWN_VALUE_CHARS = 60

AnchorKind = Literal["observation", "state"]
ActionForm = Literal["as_written", "one_line", "lower_case"]
"""How a trainer changes an action before it sends it. `as_written`: not at all. `one_line`: white space is stripped at
both ends and collapsed to one space elsewhere. `lower_case`: `one_line`, then lower case."""


def _number(value: object) -> object:
    if isinstance(value, (bool, str)):
        raise PydanticCustomError("int_type", "Input should be an integer")
    return value


# Integers as in JSON Schema: 3 and 3.0, but neither true nor "3".
Index = Annotated[int, Field(ge=0), BeforeValidator(_number)]
StepNumber = Annotated[int, Field(ge=1), BeforeValidator(_number)]
StepLimit = Annotated[int, Field(ge=1, le=10_000), BeforeValidator(_number)]


class Message(BaseModel):
    """Base of requests and results: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ResetRequest(Message):
    """Open a session on task `(split, index)`."""

    split: str = Field(description="Name of the split; see the info route.")
    index: Index = Field(description="Index of the task in the split, from 0.")
    anchor: AnchorKind = Field("observation", description="What `anchor` holds in the results of this session.")
    max_steps: StepLimit | None = Field(None, description="Truncate the episode after this many actions; none: never.")
    expert: bool = Field(False, strict=True, description="Return the scripted expert's next action with every result.")


class StepRequest(Message):
    """Take one action in a session."""

    session: str = Field(max_length=64, description="Session id, from the reset's result.")
    step: StepNumber = Field(description="Number of this action in the session, counted from 1.")
    action: str = Field(max_length=MAX_ACTION_CHARS, description="Action text.")


class StepResult(Message):
    """State of a session after a reset (`step` 0) or an action."""

    session: str = Field(description="Session id: unguessable, and all that a step needs.")
    step: int = Field(description="Actions taken so far.")
    observation: str = Field(description="Text that the agent reads.")
    reward: float = Field(description="Reward of the last action, in the environment's units; 0 after a reset.")
    terminated: bool = Field(description="The task ended by its own rules.")
    truncated: bool = Field(description="A limit ended the episode.")
    admissible: list[str] | None = Field(None, description="Actions accepted now, sorted; none: not known.")
    anchor: str = Field(description="Key of the state in which the next action is chosen.")
    facts: dict[str, Any] = Field(default_factory=dict, description="`won`, `score`, `task_type`, `goal` and others.")
    expert: str | None = Field(None, description="The scripted expert's next action, if it was requested.")
    accepted: bool = Field(
        True, description="False: the last action was malformed or not accepted. It counts as invalid."
    )

    @property
    def done(self) -> bool:
        return self.terminated or self.truncated


class Problem(BaseModel):
    """An RFC 9457 problem document."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


class BatchResetRequest(Message):
    items: list[ResetRequest] = Field(min_length=1, max_length=MAX_BATCH)


class BatchStepRequest(Message):
    items: list[StepRequest] = Field(min_length=1, max_length=MAX_BATCH)


class BatchResult(BaseModel):
    """One entry an item, in order: its result, or the problem of that item alone."""

    items: list[Annotated[StepResult | Problem, Field(union_mode="left_to_right")]]


class CloseRequest(Message):
    session: str = Field(max_length=64)


class EnvInfo(BaseModel):
    """What a server serves: `GET /info`."""

    name: str
    version: str = Field(description="Changes whenever the same actions could lead to a different episode.")
    splits: dict[str, int] = Field(description="Number of tasks of every split.")
    max_sessions: int = Field(description="Maximum number of live sessions; a further reset is a 503.")
    idle_seconds: float = Field(description="A session that is idle for this long is closed.")
    anchors: list[AnchorKind] = ["observation", "state"]
    engine: str = Field("", description="Name of the engine, for an environment that has several.")
    source: str = Field("", description="Origin of the tasks, e.g. `official` or `generated`.")
    fingerprint: str = Field(
        "",
        description="Digest of everything that determines tasks and rewards. Servers with equal fingerprints serve the "
        "same tasks.",
    )
    action_form: ActionForm = Field("as_written", description="How to change an action's text before sending it.")
    max_action_chars: int | None = Field(
        None, description="Maximum length of an action, in characters; a longer one is a 422. None: not known."
    )
    batching: bool = Field(
        False, description="Steps are fast: the steps of several sessions are best sent in one request."
    )


def invalid_value(reward: object, facts: Mapping[str, object]) -> str | None:
    """The first invalid value, in words; None if all values are valid.

    The reward and every number in the facts must be finite and fit into 64 bits, and `won` must be true, false, null or
    missing. Facts may be nested.

    Example:
        >>> invalid_value(0.0, {"won": "no"})
        'facts.won is "no", not true or false'
        >>> invalid_value(1.0, {"won": True, "score": {"parts": [1, float("inf")]}})
        'facts.score.parts.1 is inf, not a finite number of 64 bits'
    """
    if isinstance(reward, bool) or not isinstance(reward, (int, float)) or not _fits(reward):
        return f"reward is {shown_value(reward)}, not a finite number"
    won = facts.get("won")
    if won is not None and not isinstance(won, bool):
        return f"facts.won is {shown_value(won)}, not true or false"
    for path, value in _numbers(facts):
        if not _fits(value):
            return f"{path} is {shown_value(value)}, not a finite number of 64 bits"
    return None


def _fits(value: float) -> bool:
    # math.isfinite raises on integers that no float can hold.
    return -LARGEST_INTEGER <= value < LARGEST_INTEGER if isinstance(value, int) else math.isfinite(value)


def _numbers(facts: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    """Path and value of every number in nested facts. Uses a stack: foreign JSON may be nested deeply."""
    left: list[tuple[str, object]] = [("facts", facts)]
    while left:
        path, value = left.pop()
        if isinstance(value, (int, float)):
            yield path, value
        elif isinstance(value, Mapping):
            left += [(f"{path}.{name}", inner) for name, inner in value.items()]
        elif isinstance(value, (list, tuple)):
            left += [(f"{path}.{number}", inner) for number, inner in enumerate(value)]


def shown_value(value: object) -> str:
    """A value for a message, cut to `SHOWN_VALUE_CHARS` characters."""
    if isinstance(value, int) and not -LARGEST_INTEGER <= value < LARGEST_INTEGER:
        return "an integer beyond 64 bits"  # Python may refuse to print its digits
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    return text if len(text) <= SHOWN_VALUE_CHARS else f"{text[:SHOWN_VALUE_CHARS]}…"
