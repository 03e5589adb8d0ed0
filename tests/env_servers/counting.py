"""Environments for tests: reach a number by `up` and `down`."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import ClassVar

from pydantic import BaseModel, Field

from env_servers.environment import BrokenTask, Environment, Observation, UnknownTask

TASKS = 50


class Counting(Environment):
    """Task `index` is to count from 0 to `index + 2`. Split `broken` cannot be played. `fail` and `nan` are faults."""

    name = "counting"

    def __init__(self) -> None:
        self.value = 0
        self.target = 0
        self.expert = False
        self.closed = 0

    @classmethod
    def splits(cls) -> Mapping[str, int]:
        return {"train": TASKS, "broken": 1}

    @classmethod
    def about(cls) -> Mapping[str, str]:
        return {"source": "generated"}

    def reset(self, split: str, index: int, *, expert: bool = False) -> Observation:
        if split == "broken":
            raise BrokenTask("the task's file is damaged")
        if split != "train" or index >= TASKS:
            raise UnknownTask(f"no task {split}/{index}: split train has {TASKS}")
        self.value, self.target, self.expert = 0, index + 2, expert
        return self._observe(0.0)

    def step(self, action: str) -> Observation:
        if action == "fail":
            raise RuntimeError("secret inner state")
        if action == "nan":
            return self._observe(float("nan"))
        self.value += {"up": 1, "down": -1}.get(action, 0)
        return self._observe(1.0 if self.value == self.target else 0.0)

    def close(self) -> None:
        self.closed += 1

    def _observe(self, reward: float) -> Observation:
        won = self.value == self.target
        return Observation(
            text=f"The count is {self.value}, the target is {self.target}.",
            reward=reward,
            terminated=won,
            admissible=("down", "up"),
            state=f"{self.value}/{self.target}",
            facts={"won": won},
            expert="up" if self.expert else None,
        )


class Unspeakable(Counting):
    """Says what JSON cannot hold, in split `broken` at once, else with `up`, `choose` and `mumble`; `down` is fine."""

    name = "unspeakable"

    def reset(self, split: str, index: int, *, expert: bool = False) -> Observation:
        seen = super().reset("train", index, expert=expert)
        return self.step("up") if split == "broken" else seen

    def step(self, action: str) -> Observation:
        match action:
            case "up":
                return Observation(text="somewhere", facts={"things": [object()]})
            case "choose":
                return Observation(text="somewhere", admissible=("\ud800",))
            case "mumble":
                return Observation(text="\ud800")
        return super().step(action)


class Gated(Counting):
    """Blocking; a step waits until the test opens the gate."""

    name = "gated"
    blocking = True
    gate = threading.Event()
    entered = threading.Event()

    def step(self, action: str) -> Observation:
        self.entered.set()
        assert self.gate.wait(30)
        return super().step(action)


class Hanging(Counting):
    """Blocking; `hang`, and a reset to task 9, never come back before the test opens the gate."""

    name = "hanging"
    blocking = True
    gate = threading.Event()
    all_closed = threading.Semaphore(0)

    def reset(self, split: str, index: int, *, expert: bool = False) -> Observation:
        if index == 9:
            assert self.gate.wait(60)
        return super().reset(split, index, expert=expert)

    def step(self, action: str) -> Observation:
        if action == "hang":
            self.inside = True
            self.gate.wait(60)
            self.inside = False
        return super().step(action)

    def close(self) -> None:
        assert not getattr(self, "inside", False), "closed while a step was being taken"
        super().close()
        self.all_closed.release()


class Stuck(Counting):
    """Stops its whole server, of one thread, for a while at the second `up` of task 1."""

    name = "stuck"

    def step(self, action: str) -> Observation:
        if self.target == 3 and self.value == 1 and action == "up":
            time.sleep(1.5)
        return super().step(action)


class Retold(Counting):
    """Says that its tasks are others."""

    @classmethod
    def about(cls) -> Mapping[str, str]:
        return {**super().about(), "fingerprint": "other"}


class Stateless(Counting):
    """Gives no state digest."""

    name = "stateless"

    def _observe(self, reward: float) -> Observation:
        return Observation(text="somewhere", reward=reward)


class Broken(Counting):
    """Cannot even say which splits it has."""

    name = "unplugged"

    @classmethod
    def splits(cls) -> Mapping[str, int]:
        raise BrokenTask("the data folder is empty: set COUNTING_DATA")


class Patient(Counting):
    """Blocking, so it runs in threads."""

    name = "patient"
    blocking = True


class Sized(Counting):
    """Has parameters: the number of its tasks, and what `up` adds."""

    name = "sized"

    class Params(BaseModel):
        tasks: int = Field(TASKS, ge=1, le=TASKS)
        stride: int = 1

    params: ClassVar[Params]

    @classmethod
    def splits(cls) -> Mapping[str, int]:
        return {"train": cls.params.tasks}

    @classmethod
    def about(cls) -> Mapping[str, str]:
        return {**super().about(), "fingerprint": cls.params.model_dump_json()}

    def step(self, action: str) -> Observation:
        self.value += self.params.stride - 1 if action == "up" else 0
        return super().step(action)
