"""The official engine, and the process that runs one game of it: the only file that knows TextWorld.

`python -m env_servers.alfworld.textworld_worker` answers requests on standard input, one JSON object a line, with one
JSON object a line on standard output: `{"document": …}` starts a game, `{"command": …}` plays on. An answer holds
`text`, `admissible`, `won` and `digest`, or `error`.

Invariants
- One process plays one game at a time: the engine's planner library is neither thread-safe nor reentrant.
- Only answers reach standard output; what the engine prints goes to standard error.
- The process ends as soon as its standard input closes, even in the middle of an answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import sys
import threading
from collections.abc import Mapping
from typing import Any, TextIO

from env_servers.alfworld.package import alfworld_module

# Facts that no later answer depends on: what was looked at, and lamps by whether they burn rather than were used.
_IRRELEVANT = frozenset({"checked", "ison"})
# The one negated fact that the grammar asks for; the others only repeat that the positive one is absent.
_RELEVANT_NEGATION = "not_inreceptacle"


class TextWorldGame:
    """TextWorld's PDDL engine in ALFWorld's own wrappers, names not shuffled. Plays one game after another."""

    def __init__(self) -> None:
        import textworld
        from textworld.envs.pddl import PddlEnv

        wrappers = alfworld_module("agents.environment.alfred_tw_env")
        infos = textworld.EnvInfos(won=True, admissible_commands=True)
        self._engine = PddlEnv(infos)
        self._env = wrappers.AlfredDemangler(wrappers.AlfredInfos(self._engine), shuffle=False)
        self._state: Any = None

    def start(self, document: Mapping[str, object]) -> str:
        """Load a game file's content and answer the introduction. Whatever the engine raises on a bad file passes."""
        self._env.load(dict(document))
        self._state = self._env.reset()
        return str(self._state.feedback)

    def step(self, command: str) -> str:
        """Carry out one command and answer the engine's feedback."""
        self._state, _, _ = self._env.step(command)
        return str(self._state.feedback)

    @property
    def admissible(self) -> list[str]:
        return list(self._state["admissible_commands"])

    @property
    def won(self) -> bool:
        return bool(self._state["won"])

    @property
    def digest(self) -> str:
        """Digest of the facts that later answers depend on."""
        facts = sorted(
            f"{fact.name} {' '.join(fact.names)}"
            for fact in self._engine._pddl_state.facts
            if fact.name not in _IRRELEVANT and (fact.name == _RELEVANT_NEGATION or not fact.name.startswith("not_"))
        )
        return hashlib.blake2b("\n".join(facts).encode(), digest_size=12).hexdigest()


def serve(requests: queue.SimpleQueue[str], answers: TextIO) -> None:
    """Answer requests for as long as the process lives."""
    game = TextWorldGame()
    while True:
        try:
            answer = _answer(game, json.loads(requests.get()))
        except Exception as error:  # the engine raises its own, its parsers' and the planner's errors
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(game: TextWorldGame, request: Mapping[str, Any]) -> dict[str, object]:
    text = game.start(request["document"]) if "document" in request else game.step(request["command"])
    return {"text": text, "admissible": game.admissible, "won": game.won, "digest": game.digest}


def _read(requests: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    serve(requests, answers)


if __name__ == "__main__":
    main()
