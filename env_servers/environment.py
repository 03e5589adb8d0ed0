"""The class an environment author writes: text in, text out, one session each.

Invariants
- `reset(task)` always gives the same initial state for the same task: all of its randomness comes from the task.
- An instance is one session and shares no mutable state with any other instance.
- `terminated` (the task ended by its own rules) and `truncated` (a limit cut it off) are different things.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from env_servers.protocol import ActionForm


class TaskError(Exception):
    """Base of the errors an environment raises on bad input. The server answers them with a 4xx problem document."""


class UnknownTask(TaskError):
    """The task does not exist: unknown split, or an index outside of it."""


class BrokenTask(TaskError):
    """The task exists but its data cannot be played (broken game file, missing product …)."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What an environment answers to a reset (reward 0) or a step.

    Attributes:
        text: what the agent reads.
        reward: reward of this transition in the environment's own units (0 on reset).
        terminated: the task has ended by its own rules.
        truncated: a limit (steps) cut the episode off.
        admissible: the actions the environment accepts now, sorted, or None where it cannot know them.
        state: a digest of the exact environment state, for anchors by state.
        facts: JSON-able facts about the episode: `won`, `score`, `task_type`, `goal` …
        expert: the action a scripted expert would take now, where the environment has one and it was asked for.
        accepted: False where the environment could make nothing of the action: it then counts as invalid.
    """

    text: str
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    admissible: tuple[str, ...] | None = None
    state: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)
    expert: str | None = None
    accepted: bool = True


class Environment(ABC):
    """One session of an environment. The server makes one instance a session and calls it from one thread at a time."""

    name: ClassVar[str]
    version: ClassVar[str] = "1"
    """Changes whenever the same actions could give another episode."""
    blocking: ClassVar[bool] = False
    """True for an environment whose calls are slow: the server then runs it in a thread, never on its loop, and gives
    a call up that takes too long. Only then: nothing can interrupt a call on the loop."""
    action_form: ClassVar[ActionForm] = "as_written"
    """What a trainer does to an action's text before it sends it. `step` gets what was sent, byte for byte."""

    @classmethod
    @abstractmethod
    def splits(cls) -> Mapping[str, int]:
        """Name and number of tasks of every split."""

    @classmethod
    def about(cls) -> Mapping[str, str]:
        """`engine`, `source` and `fingerprint` of the info route, where they could be others on another server.

        `fingerprint` is a digest of all that makes tasks and rewards: data, seeds, settings. A run refuses to play on
        several servers of one environment whose fingerprints differ.
        """
        return {}

    @abstractmethod
    def reset(self, split: str, index: int, *, expert: bool = False) -> Observation:
        """Start the task. With `expert`, every observation names the scripted expert's next action.

        Raises:
            UnknownTask: no such split, or index outside of it.
            BrokenTask: the task's data cannot be played.
        """

    @abstractmethod
    def step(self, action: str) -> Observation:
        """Take one action. An action the environment does not understand is a transition like any other."""

    def close(self) -> None:
        """Release what the session holds. Called exactly once."""
        return
