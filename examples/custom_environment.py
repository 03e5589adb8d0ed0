"""An environment of your own: things lie about, and each has its place, which nobody tells the policy.

    anchorage train examples/custom_environment.yaml

An episode shows four things one after another; the action for each is to go to a place. The reward of a step is 1 where
the place is right, so what the policy learns is a table from things to places. All episodes of a group meet the same
things: each of their steps is an anchor group of its own, and GiGPO compares the places that were tried for one thing.

Texts and actions are those of ALFWorld's rooms, so the starter policy can play at once. See docs/environments.md.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from pydantic import BaseModel, Field

from env_servers.environment import Environment, Observation, UnknownTask

PLACES = {
    "desk 1": ("book", "pen", "laptop"),
    "drawer 1": ("fork", "knife", "spoon"),
    "garbagecan 1": ("apple", "egg", "tomato"),
    "shelf 1": ("bowl", "mug", "vase"),
}
"""The things of each place."""

PLACE_OF = {thing: place for place, things in PLACES.items() for thing in things}
ACTIONS = tuple(f"go to {place}" for place in PLACES)
GOAL = "put all things in their places."
ROOM = f"""-= Welcome to TextWorld, ALFRED! =-

You are in the middle of a room. Looking quickly around you, you see a {", a ".join(PLACES)}.

Your task is to: {GOAL}"""


class TidyUp(Environment):
    """A task is a sequence of things; won is an episode with every thing in its place."""

    name = "tidy_up"
    version = "1"

    class Params(BaseModel, extra="forbid"):
        things: int = Field(4, ge=1, le=len(PLACE_OF))
        """Things, and so steps, in an episode."""

    @classmethod
    def splits(cls) -> Mapping[str, int]:
        return {"train": 10_000, "test": 256}

    @classmethod
    def about(cls) -> Mapping[str, str]:
        return {"fingerprint": f"things={cls.params.things}"}  # with another number the tasks are others

    def reset(self, split: str, index: int, *, expert: bool = False) -> Observation:
        if index >= self.splits().get(split, 0):
            raise UnknownTask(f"no task {split}/{index}: the splits are {self.splits()}")
        self._left = random.Random(f"{split}/{index}").sample(sorted(PLACE_OF), self.params.things)
        self._wrong = 0
        self._expert = expert
        return self._observe(f"{ROOM}\n\n{self._sight()}")

    def step(self, action: str) -> Observation:
        if action not in ACTIONS:
            return self._observe(f"Nothing happens. {self._sight()}", accepted=False)
        right = action == f"go to {PLACE_OF[self._left.pop(0)]}"
        self._wrong += not right
        return self._observe(self._sight(), reward=float(right))

    def _sight(self) -> str:
        return f"You pick up the {self._left[0]} 1 from the floor." if self._left else "The floor is empty."

    def _observe(self, text: str, reward: float = 0.0, accepted: bool = True) -> Observation:
        return Observation(
            text=text,
            reward=reward,
            terminated=not self._left,
            admissible=ACTIONS,
            facts={"won": not self._left and not self._wrong, "goal": GOAL},
            expert=f"go to {PLACE_OF[self._left[0]]}" if self._expert and self._left else None,
            accepted=accepted,
        )
