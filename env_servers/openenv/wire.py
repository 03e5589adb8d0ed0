"""OpenEnv's messages, as far as text environments need them. Used by the server and by the client.

Invariants
- Everything that an agent needs is a field of the observation: OpenEnv 0.3 does not send `metadata`.
- `done` says that an episode is over; `terminated` and `truncated` say why.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from env_servers.protocol import MAX_ACTION_CHARS, AnchorKind, Index, ResetRequest, StepLimit, StepResult

MAX_EPISODE_ID_CHARS = 255


class ErrorCode(StrEnum):
    INVALID_JSON = "INVALID_JSON"
    UNKNOWN_TYPE = "UNKNOWN_TYPE"
    VALIDATION_ERROR = "VALIDATION_ERROR"
    EXECUTION_ERROR = "EXECUTION_ERROR"
    CAPACITY_REACHED = "CAPACITY_REACHED"
    SESSION_ERROR = "SESSION_ERROR"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextAction(Strict):
    """An action: a text."""

    action: str = Field(max_length=MAX_ACTION_CHARS, description="Action text.")
    metadata: dict[str, Any] = Field(default_factory=dict, description="Ignored.")


class TextObservation(BaseModel):
    """What an agent sees and a trainer needs. In messages `done` and `reward` stand beside the observation."""

    done: bool = Field(False, description="The episode is over.")
    reward: float | None = Field(None, description="Reward of the last action.")
    metadata: dict[str, Any] = Field(default_factory=dict, description="Always empty.")
    text: str = Field(description="Text that the agent reads.")
    task: str = Field(description="The goal in words if the environment states it, else `split/index`.")
    split: str
    index: int
    step: int = Field(description="Actions taken so far.")
    admissible_actions: list[str] | None = Field(None, description="Actions accepted now; none: not known.")
    anchor: str = Field(description="Key of the state in which the next action is chosen.")
    terminated: bool = Field(False, description="The task ended by its own rules.")
    truncated: bool = Field(False, description="A limit ended the episode.")
    won: bool | None = None
    score: float | None = None
    task_type: str | None = None
    accepted: bool = Field(True, description="False: the last action was malformed or not accepted. Omitted if true.")
    expert_action: str | None = Field(None, description="The scripted expert's next action, if it was requested.")
    facts: dict[str, Any] = Field(default_factory=dict, description="All facts of the environment.")


class State(BaseModel):
    """The state of an episode."""

    episode_id: str | None = None
    step_count: int = 0
    split: str | None = None
    index: int | None = None


class ResetData(Strict):
    """Options of a reset; none of them: a random task of the first split."""

    seed: Index | None = Field(None, description="Selects the task `seed` modulo the split's size.")
    episode_id: str | None = Field(None, max_length=MAX_EPISODE_ID_CHARS, description="Returned in the state.")
    split: str | None = None
    index: Index | None = Field(None, description="Index of the task; takes precedence over `seed`.")
    anchor: AnchorKind = "observation"
    max_steps: StepLimit | None = None
    expert: bool = Field(False, strict=True)


class ResetMessage(Strict):
    type: Literal["reset"]
    data: ResetData = ResetData()


class StepMessage(Strict):
    type: Literal["step"]
    data: TextAction


class StateMessage(Strict):
    type: Literal["state"]


class CloseMessage(Strict):
    type: Literal["close"]


class McpMessage(Strict):
    type: Literal["mcp"]
    data: dict[str, Any]


Incoming = Annotated[ResetMessage | StepMessage | StateMessage | CloseMessage | McpMessage, Field(discriminator="type")]
INCOMING: TypeAdapter[Incoming] = TypeAdapter(Incoming)


def observation_data(request: ResetRequest, result: StepResult) -> dict[str, Any]:
    """The `data` of an observation message: the observation, and `reward` and `done` beside it."""
    facts = result.facts
    return {
        "observation": {
            "text": result.observation,
            "task": str(facts.get("goal") or f"{request.split}/{request.index}"),
            "split": request.split,
            "index": request.index,
            "step": result.step,
            "admissible_actions": result.admissible,
            "anchor": result.anchor,
            "terminated": result.terminated,
            "truncated": result.truncated,
            "won": facts.get("won"),
            "score": facts.get("score"),
            "task_type": facts.get("task_type"),
            "expert_action": result.expert,
            "facts": facts,
            **({} if result.accepted else {"accepted": False}),
        },
        "reward": result.reward,
        "done": result.done,
    }


def error_data(code: ErrorCode, message: str, **more: object) -> dict[str, Any]:
    return {"message": message, "code": code.value, **more}


def json_rpc(request: Mapping[str, Any] | None) -> dict[str, Any]:
    """The response to a JSON-RPC call of the Model Context Protocol: text environments have no tools."""
    if request is None:
        return _json_rpc_error(None, -32700, "Parse error")
    identity = request.get("id")
    if not isinstance(identity, (str, int, type(None))):
        identity = None
    method = request.get("method")
    if request.get("jsonrpc") != "2.0" or not isinstance(method, str):
        return _json_rpc_error(identity, -32600, "Invalid Request")
    if method == "tools/list":
        return {"jsonrpc": "2.0", "id": identity, "result": {"tools": []}}
    return _json_rpc_error(identity, -32601, "Method not found: this environment is played over /ws and has no tools")


def _json_rpc_error(identity: str | int | None, code: int, message: str) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": identity, "error": {"code": code, "message": message, "data": None}}
