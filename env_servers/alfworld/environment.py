"""ALFWorld as an environment: household text games with reward 1 for reaching the goal.

`AlfWorld` runs the native engine; `alfworld.textworld_engine` provides the same environment on the official engine.
Games are read from the folder in `ALFWORLD_DATA`, in the official layout. Without that variable they are generated.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Protocol

from env_servers.alfworld.expert import Searcher
from env_servers.alfworld.games import GameSource, open_games
from env_servers.alfworld.native import NativeGame
from env_servers.alfworld.problem import Goal
from env_servers.environment import Environment, Observation
from env_servers.protocol import ActionForm

DATA_VARIABLE = "ALFWORLD_DATA"


class Play(Protocol):
    """The interface of one running game, whichever engine runs it."""

    @property
    def introduction(self) -> str: ...
    @property
    def admissible(self) -> list[str]: ...
    @property
    def won(self) -> bool: ...
    @property
    def digest(self) -> str: ...
    def step(self, command: str) -> str: ...


@functools.cache
def game_source() -> GameSource:
    """Return the games of this process. Raises BrokenTask if the folder in `ALFWORLD_DATA` holds no games."""
    folder = os.environ.get(DATA_VARIABLE)
    return open_games(Path(folder) if folder else None)


class AlfWorld(Environment):
    """One session of ALFWorld on the native engine. A subclass selects another engine by overriding `_start`."""

    name: ClassVar[str] = "alfworld"
    engine: ClassVar[str] = "native"
    action_form: ClassVar[ActionForm] = "lower_case"

    __slots__ = ("_expert", "_facts", "_play", "_shadow")

    def __init__(self) -> None:
        self._play: Play | None = None
        self._shadow: NativeGame | None = None
        self._expert: Searcher | None = None
        self._facts: dict[str, object] = {}

    @classmethod
    def splits(cls) -> Mapping[str, int]:
        return game_source().splits

    @classmethod
    def about(cls) -> Mapping[str, str]:
        return {"engine": cls.engine, "source": game_source().name, "fingerprint": game_source().fingerprint}

    def reset(self, split: str, index: int, *, expert: bool = False) -> Observation:
        play, goal, goal_text = self._start(split, index)
        self._play = play
        self._shadow = self._expert = None
        if expert:
            # The expert reads a native game. On another engine a native copy follows the same commands.
            shadow = play if isinstance(play, NativeGame) else NativeGame(game_source().game(split, index))
            self._shadow = None if shadow is play else shadow
            self._expert = Searcher(shadow)
        self._facts = {"task_type": goal.task_type, "goal": goal_text}
        return self._observe(play, play.introduction)

    def step(self, action: str) -> Observation:
        assert self._play is not None, "step before reset"
        text = self._play.step(action)
        if self._shadow is not None:
            self._shadow.step(action)
        return self._observe(self._play, text)

    def _start(self, split: str, index: int) -> tuple[Play, Goal, str]:
        """Start a game and return it with its goal and the goal's sentence."""
        game = game_source().game(split, index)
        return NativeGame(game), game.goal, game.goal_text

    def _observe(self, play: Play, text: str) -> Observation:
        won = play.won
        if self._expert is not None:
            self._expert.observe()
        return Observation(
            text=text,
            reward=1.0 if won else 0.0,
            terminated=won,
            admissible=tuple(play.admissible),
            state=play.digest,
            facts={**self._facts, "won": won, "score": 1.0 if won else 0.0},
            expert=self._expert.next_command() if self._expert is not None else None,
        )
