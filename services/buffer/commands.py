"""What people ask of a run, through Redis: a small, bounded list of commands, each answered by who carries it out.

Invariants
- A command is there once, whatever is repeated; it is answered at most once, and the first answer stays.
- At most `MAX_WAITING` commands wait, at most `MAX_KEPT` are remembered; answered ones leave first, oldest first.
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
    """What can be asked of a run."""

    PAUSE = "pause"
    RESUME = "resume"
    CHECKPOINT = "checkpoint"
    EVALUATE = "evaluate"
    STOP = "stop"
    SCALE = "scale"


class Answer(BaseModel):
    """What became of a command: `at` in Unix seconds, whether it was carried out, and one line for people."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: float
    done: bool
    text: str


class Command(BaseModel):
    """One command: its id, who asked for it and when (Unix seconds); `actors` is how many to `scale` to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    action: Action
    by: str
    at: float
    actors: int | None = None
    answer: Answer | None = None


class CommandLog:
    """The commands of one run. Got from `Buffer.commands`; its methods raise what the buffer's do."""

    def __init__(self, run: Callable[..., Any], understood: Callable[[], AbstractContextManager[None]]) -> None:
        """`run` carries a script out; reading its answer happens within `understood`."""
        self._run = run
        self._understood = understood

    def request(self, command: Command) -> bool:
        """Ask for it. False: too many wait already."""
        return bool(self._run("request", command.id, command.model_dump_json(), MAX_WAITING, MAX_KEPT))

    def answer(self, command: str, answer: Answer) -> bool:
        """Answer the command with this id. False: there is none, or it has an answer."""
        return bool(self._run("answer", command, answer.model_dump_json()))

    def waiting(self) -> list[Command]:
        """Commands without an answer, oldest first."""
        return [command for command in self.all() if command.answer is None]

    def all(self) -> list[Command]:
        """All commands that are remembered, oldest first."""
        found = self._run("commands")
        with self._understood():
            return [
                Command.model_validate_json(text).model_copy(
                    update={"answer": Answer.model_validate_json(answer) if answer else None}
                )
                for text, answer in zip(found[::2], found[1::2], strict=True)
            ]
