"""The base class of environments: text in, text out, one session an instance.

Invariants
- `reset(task)` always gives the same initial state for the same task: all randomness comes from the task.
- An instance is one session and shares no mutable state with any other instance.
- `terminated` (the task ended by its own rules) and `truncated` (a limit ended the episode) are different things.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel, ValidationError

from env_servers.protocol import ActionForm


class TaskError(Exception):
    """Base of an environment's errors for bad input. The server turns them into 4xx problem documents."""


class UnknownTask(TaskError):
    """The task does not exist: unknown split, or index out of range."""


class BrokenTask(TaskError):
    """The task exists, but its data cannot be played (damaged game file, missing product …)."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What an environment returns from a reset or a step.

    Attributes:
        text: text that the agent reads.
        reward: reward of this transition, in the environment's own units; 0 on reset.
        terminated: the task has ended by its own rules.
        truncated: a limit of the environment ended the episode.
        admissible: the actions that are accepted now, sorted; None: not known.
        state: digest of the exact environment state, for anchors by state; empty: no such anchors.
        facts: facts about the episode that JSON can hold: `won`, `score`, `task_type`, `goal` and others.
        expert: the scripted expert's next action, if the environment has one and it was requested.
        accepted: False if the action was malformed or not accepted; it then counts as invalid.
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
    """Base class of environments. An instance is one session; it is called from one thread at a time.

    Example:
        class Guess(Environment):
            name = "guess"

            @classmethod
            def splits(cls):
                return {"train": 10}

            def reset(self, split, index, *, expert=False):
                self.number = index
                return Observation("Guess a number from 0 to 9.")

            def step(self, action):
                won = action == str(self.number)
                return Observation("Right." if won else "Wrong.", reward=float(won), terminated=won, facts={"won": won})
    """

    name: ClassVar[str]
    """Name of the environment in `/info` and in messages."""
    version: ClassVar[str] = "1"
    """Changes whenever the same actions could lead to a different episode."""
    blocking: ClassVar[bool] = False
    """True if a call may take longer than a millisecond or so. The server then calls it in a thread and abandons a call
    that takes too long; a call on the event loop delays every other session and cannot be interrupted."""
    action_form: ClassVar[ActionForm] = "as_written"
    """How a trainer changes an action's text before it sends it. `step` gets what was sent, byte for byte."""
    Params: ClassVar[type[BaseModel] | None] = None
    """Model of the environment's parameters (`env.params` of a recipe); None: it takes none."""
    params: ClassVar[Any]
    """The parameters, an instance of `Params`: also for `splits` and `about`. Where none are given: the defaults."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        model = vars(cls).get("Params")
        if model is None or "params" in vars(cls):
            return
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            raise TypeError(f"{cls.__name__}.Params must be a pydantic model")
        with suppress(ValidationError):  # some are required: only `with_params` gives them
            cls.params = model()

    @classmethod
    @abstractmethod
    def splits(cls) -> Mapping[str, int]:
        """Number of tasks of every split, by name. Raises TaskError if the tasks cannot be offered."""

    @classmethod
    def about(cls) -> Mapping[str, str]:
        """`engine`, `source` and `fingerprint` of the info route, as far as they may differ between servers.

        `fingerprint` is a digest of everything that determines tasks and rewards: data, seeds, settings. A run refuses
        to use several servers of one environment with different fingerprints.
        """
        return {}

    @abstractmethod
    def reset(self, split: str, index: int, *, expert: bool = False) -> Observation:
        """Start a task.

        Args:
            split: name of the split.
            index: index of the task in the split, from 0.
            expert: set the scripted expert's next action in every observation.

        Raises:
            UnknownTask: no such split, or index out of range.
            BrokenTask: the task's data cannot be played.
        """

    @abstractmethod
    def step(self, action: str) -> Observation:
        """Take one action. An action that is not understood is a transition like any other, with `accepted=False`."""

    def close(self) -> None:
        """Release the session's resources. Called exactly once."""
        return
