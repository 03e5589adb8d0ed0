"""Data that all packages exchange: tasks, tickets, steps, trajectories. Plain data without behaviour.

Invariants
- A ticket's id is computed from `(stream, group, member)`, never random.
- Token ids and log-probabilities are exactly those that the inference engine sampled; nothing is tokenized again.
- Every response records which policy version sampled which of its tokens.
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
    """One problem of an environment. A reset to it always gives the same initial state.

    Attributes:
        env: name of the environment.
        split: its split, such as `train`.
        index: its number in the split.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    env: str
    split: str
    index: int


class Ticket(BaseModel):
    """A request to play one episode.

    Attributes:
        stream: `train`, or one of an evaluation such as `eval-000040`; each stream numbers its groups on its own.
        group: number of the group in its stream.
        member: number of the episode in its group.
        group_size: number of episodes in the group.
        task: the task, which is the same for the whole group.
        seed: seeds the sampling of this episode.
        temperature: sampling temperature.
        max_steps: truncates the episode after so many steps; None: only the environment does.
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
        """`stream/group/member`, unique within a run."""
        return f"{self.stream}/{self.group}/{self.member}"


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """`tokens` consecutive response tokens that policy `version` sampled."""

    version: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Step:
    """One call of the policy: one prompt, one response, and the environment transition that followed.

    In an agent program's episode several calls may be made in one state of the environment. They are one turn (see
    `services.turns`), and its last call carries the transition.

    Attributes:
        prompt_ids: int32 [P], the prompt as the engine received it.
        response_ids: int32 [R], the sampled tokens, including end-of-sequence if it was sampled.
        logprobs: float32 [R], log-probability of each sampled token under the sampling distribution (nats).
        versions: policy versions of the response, in token order; their token counts sum to R.
        anchor: key of the environment state in which the action was chosen.
        observation: text of that state.
        prompt: text of the prompt.
        response: decoded response.
        action: what was sent to the environment.
        reward: reward of the transition.
        valid: whether the response passed the run's validity rule.
        terminated: whether the transition ended the episode.
        truncated: whether a limit cut the episode after the transition.
        finished: whether the response ended by itself, not at the token limit.
        prompt_truncated: whether a part of the prompt was left out because it did not fit.
        turn: calls of an episode with the same number >= 0 are one turn; −1: a turn of its own.
        trained: whether it is trained on. An untrained call has no advantage and opens no turn.
        extends: number of the earlier step whose prompt and response begin this prompt; −1: none is known.
        tool_calls: of the response, as JSON: a list of objects with the texts `name` and `arguments`; empty: none.
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
    turn: int = -1
    trained: bool = True
    extends: int = -1
    tool_calls: str = ""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One played episode.

    Attributes:
        ticket: the request to play it.
        steps: its S steps.
        facts: JSON-able facts of the environment, such as `won`, `score`, `task_type`.
        actor: name of the actor that played it.
        started_at: Unix seconds.
        finished_at: Unix seconds.
        final_anchor: key of the environment state that the last step led to; None: not known.
    """

    ticket: Ticket
    steps: tuple[Step, ...]
    facts: Mapping[str, object] = field(default_factory=dict)
    actor: str = ""
    started_at: float = 0.0
    finished_at: float = 0.0
    final_anchor: str | None = None

    @property
    def oldest_version(self) -> int:
        """Smallest policy version that sampled a token of this trajectory."""
        return min(span.version for step in self.steps for span in step.versions)

    @property
    def reward(self) -> float:
        """Undiscounted sum of step rewards."""
        return float(sum(step.reward for step in self.steps))

    @property
    def won(self) -> bool:
        """The fact `won`, false if it is missing."""
        return bool(self.facts.get("won", False))

    @property
    def response_tokens(self) -> int:
        """Number of sampled tokens."""
        return sum(len(step.response_ids) for step in self.steps)
