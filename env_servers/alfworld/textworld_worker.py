"""The official engine and the process that runs it: the only file that imports TextWorld.

`python -m env_servers.alfworld.textworld_worker` reads requests from standard input, one JSON object per line, and
writes one JSON object per line to standard output: `{"document": …}` starts a game, `{"command": …}` takes a step.
A response holds `text`, `admissible`, `won` and `digest`, or `error`.

Invariants
- One process plays one game at a time: the engine's planner library is neither thread-safe nor reentrant.
- Only responses go to standard output; whatever the engine prints goes to standard error.
- The process exits as soon as its standard input closes, even during a request.
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

# Facts that no later observation depends on: what was examined, and whether a lamp is lit (only its use counts).
_IRRELEVANT = frozenset({"checked", "ison"})
# The only negated fact that the grammar reads; the others merely state that the positive fact is absent.
_RELEVANT_NEGATION = "not_inreceptacle"


class TextWorldGame:
    """TextWorld's PDDL engine in ALFWorld's own wrappers, without shuffled names. Plays one game after another."""

    def __init__(self) -> None:
        import textworld
        from textworld.envs.pddl import PddlEnv

        wrappers = alfworld_module("agents.environment.alfred_tw_env")
        infos = textworld.EnvInfos(won=True, admissible_commands=True)
        self._engine = PddlEnv(infos)
        self._env = wrappers.AlfredDemangler(wrappers.AlfredInfos(self._engine), shuffle=False)
        self._state: Any = None

    def start(self, document: Mapping[str, object]) -> str:
        """Load the content of a game file and return the introduction. Errors of the engine propagate."""
        self._env.load(dict(document))
        self._state = self._env.reset()
        return str(self._state.feedback)

    def step(self, command: str) -> str:
        """Execute one command and return the engine's feedback."""
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
        """Digest of the facts that later observations depend on."""
        facts = sorted(
            f"{fact.name} {' '.join(fact.names)}"
            for fact in self._engine._pddl_state.facts
            if fact.name not in _IRRELEVANT and (fact.name == _RELEVANT_NEGATION or not fact.name.startswith("not_"))
        )
        return hashlib.blake2b("\n".join(facts).encode(), digest_size=12).hexdigest()


def serve(requests: queue.SimpleQueue[str], responses: TextIO) -> None:
    """Handle requests until the process exits."""
    game = TextWorldGame()
    while True:
        try:
            response = _handle(game, json.loads(requests.get()))
        except Exception as error:  # engine, parsers and planner each raise errors of their own
            response = {"error": f"{type(error).__name__}: {error}"[:500]}
        responses.write(json.dumps(response) + "\n")
        responses.flush()


def _handle(game: TextWorldGame, request: Mapping[str, Any]) -> dict[str, object]:
    text = game.start(request["document"]) if "document" in request else game.step(request["command"])
    return {"text": text, "admissible": game.admissible, "won": game.won, "digest": game.digest}


def _read(requests: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


def main() -> None:
    responses = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the planner library prints to descriptor 1, which would corrupt the responses
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    serve(requests, responses)


if __name__ == "__main__":
    main()
