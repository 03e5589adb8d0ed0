"""The wire format of the step API: what crosses HTTP between an environment server and its clients.

Invariants
- A session is made by reset and named by an unguessable id; a step names `(session, step)`, where `step` counts the
  actions taken from 1. The answer to the last step is kept, so a client may repeat it; any other number is a 409.
- Errors are RFC 9457 problem documents (`application/problem+json`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_ACTION_CHARS = 4096
MAX_BATCH = 1024
FREE_TEXT = "<your query>"
"""An admissible action that holds this stands for every action with some text in its place."""

AnchorKind = Literal["observation", "state"]
ActionForm = Literal["as_written", "one_line", "lower_case"]
"""What is done to an action before it is sent. `as_written`: nothing. `one_line`: white space is dropped at both ends
and is one space elsewhere. `lower_case`: that, in lower case."""


def _number(value: object) -> object:
    if isinstance(value, (bool, str)):
        raise PydanticCustomError("int_type", "Input should be an integer")
    return value


# Integers as JSON schema has them: 3 and 3.0, but neither true nor "3".
Index = Annotated[int, Field(ge=0), BeforeValidator(_number)]
StepNumber = Annotated[int, Field(ge=1), BeforeValidator(_number)]
StepLimit = Annotated[int, Field(ge=1, le=10_000), BeforeValidator(_number)]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ResetRequest(Message):
    """Start a session on task `(split, index)`."""

    split: str = Field(description="Name of the split; see the info route.")
    index: Index = Field(description="Number of the task within the split.")
    anchor: AnchorKind = Field("observation", description="What `anchor` of the answers holds.")
    max_steps: StepLimit | None = Field(None, description="Truncate after this many actions; none: never.")
    expert: bool = Field(False, strict=True, description="Name the scripted expert's next action in every answer.")


class StepRequest(Message):
    """Take one action in a session."""

    session: str = Field(max_length=64, description="Id that reset answered.")
    step: StepNumber = Field(description="Number of this action in the session, counted from 1.")
    action: str = Field(max_length=MAX_ACTION_CHARS, description="Action text.")


class StepResult(Message):
    """State of a session after a reset (`step` 0) or an action."""

    session: str = Field(description="Id of the session: unguessable, and all that a step needs.")
    step: int = Field(description="Actions taken so far.")
    observation: str = Field(description="What the agent reads.")
    reward: float = Field(description="Reward of the last action, in the environment's units; 0 after a reset.")
    terminated: bool = Field(description="The task ended by its own rules.")
    truncated: bool = Field(description="A limit cut the episode off.")
    admissible: list[str] | None = Field(None, description="Actions accepted now, sorted, where they are known.")
    anchor: str = Field(description="Key of the state in which the next action is chosen.")
    facts: dict[str, Any] = Field(default_factory=dict, description="`won`, `score`, `task_type`, `goal` and so on.")
    expert: str | None = Field(None, description="What a scripted expert would do, where it was asked for.")
    accepted: bool = Field(
        True, description="False: the last action was malformed or unacceptable. It counts as invalid."
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
    """One entry per item, in order: the result, or the problem that this item alone met."""

    items: list[Annotated[StepResult | Problem, Field(union_mode="left_to_right")]]


class CloseRequest(Message):
    session: str = Field(max_length=64)


class EnvInfo(BaseModel):
    """What a server serves: `GET /info`."""

    name: str
    version: str = Field(description="Changes whenever the same actions could give another episode.")
    splits: dict[str, int] = Field(description="Name and number of tasks of every split.")
    max_sessions: int = Field(description="Live sessions at the same time; a reset beyond them is a 503.")
    idle_seconds: float = Field(description="A session unused for this long is closed.")
    anchors: list[AnchorKind] = ["observation", "state"]
    engine: str = Field("", description="Which of several engines plays.")
    source: str = Field("", description="Where the tasks come from, e.g. `official` or `generated`.")
    fingerprint: str = Field(
        "",
        description="Digest of all that makes tasks and rewards: two servers with the same one serve the same tasks.",
    )
    action_form: ActionForm = Field("as_written", description="What to do to an action's text before it is sent.")
    max_action_chars: int | None = Field(
        None, description="Longest action, in characters; a longer one is refused with 422. None: not known."
    )
    batching: bool = Field(
        False, description="Steps are quick: those of several sessions are best sent in one request."
    )
