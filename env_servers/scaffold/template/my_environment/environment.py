"""Guess a number; every observation says whether it is higher or lower. Replace this with your own environment.

The trainer relies on these rules, and `anchorage env check` verifies them:
- a reset to the same task always gives the same initial state: all randomness is derived from the task;
- the same actions from there always give the same observations;
- an instance is one session and shares no mutable state with other instances.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping

from pydantic import BaseModel, Field

from env_servers.environment import Environment, Observation, UnknownTask

SPLITS = {"train": 1000, "test": 100}


class MyEnvironment(Environment):
    """Guess a number between 1 and 20, or as high as the parameters say."""

    class Params(BaseModel):
        """What a recipe may set, as in `env.params.highest=50`. Without parameters, leave it and `about` out."""

        highest: int = Field(20, ge=2, le=99)

    name = "my_environment"
    version = "1"  # change it whenever the same actions may give another episode
    blocking = False  # True if a step takes more than about 1 ms: it then runs in a thread

    def __init__(self) -> None:
        self._target = 0
        self._low, self._high = 1, self.params.highest  # the numbers that are still possible
        self._guesses = 0
        self._expert = False

    @classmethod
    def splits(cls) -> Mapping[str, int]:
        return SPLITS

    @classmethod
    def about(cls) -> Mapping[str, str]:
        """Parameters that change tasks: a run does not start on servers that differ in them."""
        return {"fingerprint": hashlib.sha256(cls.params.model_dump_json().encode()).hexdigest()[:16]}

    def reset(self, split: str, index: int, *, expert: bool = False) -> Observation:
        if index >= SPLITS.get(split, 0):
            raise UnknownTask(f"no task {split}/{index}: the splits are {SPLITS}")
        self._target = random.Random(f"{split}/{index}").randint(1, self.params.highest)
        self._low, self._high = 1, self.params.highest
        self._guesses = 0
        self._expert = expert
        return self._observe(f"I think of a number between 1 and {self.params.highest}. Guess it.")

    def step(self, action: str) -> Observation:
        verb, _, number = action.partition(" ")
        if verb != "guess" or not number.isascii() or not number.isdecimal() or len(number) > 2:
            return self._observe("Nothing happens. Say: guess 7")  # an invalid action is an ordinary transition
        guess = int(number)
        self._guesses += 1
        if guess == self._target:
            return self._observe(f"Yes, {guess} it is!", won=True)
        if guess < self._target:
            self._low = max(self._low, guess + 1)
            return self._observe(f"It is higher than {guess}.")
        self._high = min(self._high, guess - 1)
        return self._observe(f"It is lower than {guess}.")

    def _observe(self, text: str, won: bool = False) -> Observation:
        return Observation(
            text=text,
            reward=1.0 if won else 0.0,
            terminated=won,
            admissible=tuple(sorted(f"guess {number}" for number in range(1, self.params.highest + 1))),
            # Equal states must have equal digests, whatever actions led there. Without a digest, leave `state` out.
            state=f"{self._target}:{self._low}-{self._high}:{won}",
            facts={"won": won, "score": float(won), "goal": f"guess a number between 1 and {self.params.highest}"},
            expert=f"guess {(self._low + self._high) // 2}" if self._expert else None,
        )
