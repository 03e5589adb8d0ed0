"""What crosses between the rooms: tickets, steps, trajectories. Plain data, no behaviour beyond identities and sums.

Invariants
- A ticket's identity is computed from `(stream, group, member)` within a run, never random.
- Token ids and log-probabilities are the very ones the inference engine sampled; nothing is re-tokenised.
- Every response says which policy versions wrote which of its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FiniteFloat

TRAIN_STREAM = "train"

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]


class Task(BaseModel):
    """One problem of an environment. Resetting to it always gives the same initial state."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    env: str
    split: str
    index: int


class Ticket(BaseModel):
    """The order to play one episode.

    `stream` separates training (`train`) from evaluation panels (`eval-000040`), whose groups are
    numbered apart.
    `seed` seeds the sampling of this episode; `temperature` is the sampling temperature. `max_steps` cuts the episode
    short of the environment's `max_steps`; None: it does not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stream: str = TRAIN_STREAM
    group: int
    member: int
    group_size: int
    task: Task
    seed: int
    temperature: FiniteFloat = 1.0
    max_steps: int | None = None

    @property
    def id(self) -> str:
        return f"{self.stream}/{self.group}/{self.member}"


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """`tokens` consecutive response tokens written by policy `version`."""

    version: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Step:
    """One prompt, one response, one environment transition.

    Attributes:
        prompt_ids: int32 [P], the prompt as the engine saw it.
        response_ids: int32 [R], the sampled tokens, end-of-sequence included where it was sampled.
        logprobs: float32 [R], log-probability of each sampled token under the sampling distribution (nats).
        versions: policy versions of the response, in token order; their token counts sum to R.
        anchor: key of the environment state in which the action was chosen.
        observation: text of that state. response: decoded response. action: what was sent to the environment.
        reward: reward of the transition. valid: the response passed the run's validity rule.
        terminated / truncated: of the transition.
        prompt: text of the prompt.
        finished: the response ended by itself, not by the token limit.
        prompt_truncated: something was left out of the prompt for want of room.
    """

    prompt_ids: IntArray
    response_ids: IntArray
    logprobs: FloatArray
    versions: tuple[VersionSpan, ...]
    anchor: str
    observation: str
    prompt: str
    response: str
    action: str
    reward: float
    valid: bool
    terminated: bool = False
    truncated: bool = False
    finished: bool = True
    prompt_truncated: bool = False


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One played episode: its ticket, its steps, and facts such as `won`, `score`, `task_type`."""

    ticket: Ticket
    steps: tuple[Step, ...]
    facts: Mapping[str, object] = field(default_factory=dict)
    actor: str = ""
    started_at: float = 0.0
    finished_at: float = 0.0

    @property
    def oldest_version(self) -> int:
        """Smallest policy version that produced a token of this trajectory."""
        return min(span.version for step in self.steps for span in step.versions)

    @property
    def reward(self) -> float:
        """Undiscounted sum of step rewards."""
        return float(sum(step.reward for step in self.steps))

    @property
    def won(self) -> bool:
        return bool(self.facts.get("won", False))

    @property
    def response_tokens(self) -> int:
        return sum(len(step.response_ids) for step in self.steps)
