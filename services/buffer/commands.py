"""Commands that people send to a run through Redis: a small, bounded list, answered by the process that executes them.

Invariants
- Requests are idempotent. A command has at most one answer: the first one stays.
- At most `MAX_WAITING` commands wait and at most `MAX_KEPT` are kept; the oldest answered ones are dropped first.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from pydantic import BaseModel, ConfigDict

MAX_WAITING = 16
MAX_KEPT = 200


class Action(enum.StrEnum):
    """What a run can be asked to do."""

    PAUSE = "pause"
    RESUME = "resume"
    CHECKPOINT = "checkpoint"
    EVALUATE = "evaluate"
    STOP = "stop"
    SCALE = "scale"


class Answer(BaseModel):
    """Outcome of a command.

    Attributes:
        at: when it was answered, Unix seconds.
        done: whether it was executed.
        text: one line for people.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: float
    done: bool
    text: str


class Command(BaseModel):
    """One command.

    Attributes:
        id: chosen by the sender, unique within the run.
        action: what to do.
        by: name of the sender.
        at: when it was sent, Unix seconds.
        actors: number of rollout actors, for `scale` only.
        answer: its outcome, None while it waits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    action: Action
    by: str
    at: float
    actors: int | None = None
    answer: Answer | None = None


class CommandLog:
    """The commands of one run, from `Buffer.commands`. Methods raise what the buffer's methods raise."""

    def __init__(self, run: Callable[..., Any], parsing: Callable[[], AbstractContextManager[None]]) -> None:
        """`run` executes a script; its reply is parsed within `parsing`."""
        self._run = run
        self._parsing = parsing

    def request(self, command: Command) -> bool:
        """Send a command; False if too many wait already."""
        return bool(self._run("request", command.id, command.model_dump_json(), MAX_WAITING, MAX_KEPT))

    def answer(self, command: str, answer: Answer) -> bool:
        """Answer the command with this id; False if there is none or it has an answer."""
        return bool(self._run("answer", command, answer.model_dump_json()))

    def waiting(self) -> list[Command]:
        """Commands without an answer, oldest first."""
        return [command for command in self.all() if command.answer is None]

    def all(self) -> list[Command]:
        """All commands that are kept, oldest first."""
        found = self._run("commands")
        with self._parsing():
            return [
                Command.model_validate_json(text).model_copy(
                    update={"answer": Answer.model_validate_json(answer) if answer else None}
                )
                for text, answer in zip(found[::2], found[1::2], strict=True)
            ]
