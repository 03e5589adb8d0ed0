"""Agent programs' episodes as data of a warm start: what a scripted player would answer to each call, and the rows.

The agent plays through the gateway as in a run. A scripted player answers in the engine's place, or the engine answers
and the player says what it would have done (DAgger, arXiv:1011.0686). How an action is written follows from the tools
that the agent declares: a call of the tool that takes one text, or without tools a text.

Invariants
- A row is what the gateway records of the call, token for token: its prompt, and the answer with its end.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from actors.engine.interface import Sample
from actors.episode import EpisodeFailed
from actors.gateway.conversation import Prompt
from actors.gateway.messages import Message, Tool, ToolCall
from actors.gateway.render import Renderer
from actors.gateway.session import Bound
from actors.scripted import Answer, Distribution, Example, Player, next_tokens
from services.errors import AnchorageError
from services.schemas import VersionSpan

_NUMBERED_NAME = re.compile(r"( [a-z]+) (\d+)")


class NoToolForActions(AnchorageError):
    """None of the agent's tools can take an action."""


class ActionWriter:
    """Writes actions as the answers of a policy.

    Args:
        renderer: of the policy's prompts.
    """

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._end = renderer.tokenizer.eos_token_id
        self.ids = functools.lru_cache(maxsize=65_536)(self._ids)

    def _ids(self, action: str, tools: str) -> tuple[int, ...]:
        answer = answer_of(action, json.loads(tools) if tools else ())
        return (*self._renderer.tokens.encode(self._renderer.written(answer)), self._end)

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer, without its end."""
        text: str = self._renderer.tokenizer.decode(list(ids[:-1]), skip_special_tokens=False)
        return text


def answer_of(action: str, tools: Sequence[Tool]) -> Message:
    """What a policy without a thought answers to take an action.

    Args:
        action: as the environment spells it.
        tools: that the agent declares. The first that takes one text, required or the only parameter, is called.

    Raises:
        NoToolForActions: there are tools, and none takes one text.

    Example: with the tool `act(action: string)`, `look` is the call `act(action="look")`.
    """
    if not tools:
        return Message("assistant", action)
    for tool in tools:
        function = tool.get("function")
        parameter = _only_text(function) if isinstance(function, Mapping) else None
        if isinstance(function, Mapping) and parameter is not None:
            arguments = json.dumps({parameter: action}, ensure_ascii=False)
            return Message("assistant", tool_calls=(ToolCall(str(function["name"]), arguments),))
    raise NoToolForActions("none of the agent's tools takes one text: a warm start cannot write actions as their calls")


def _only_text(function: Mapping[str, Any]) -> str | None:
    """The parameter of a tool that takes one text; None if it takes something else."""
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    if not isinstance(parameters, Mapping) or not isinstance(properties, Mapping):
        return None
    needed = [*(parameters.get("required") or properties)]
    about = properties.get(needed[0]) if len(needed) == 1 else None
    return str(needed[0]) if isinstance(about, Mapping) and about.get("type") == "string" else None


class Imitation:
    """Answers the calls of one attempt, or has the engine answer, and keeps what should have been answered.

    Args:
        session: of the attempt; the environment's expert is asked for.
        player: chooses actions, and says what it intends.
        writer: writes them.
        only_experts: whether to imitate only the expert's action where there is one.
        plays: whether the player answers; otherwise the engine does.

    Attributes:
        answers: one for each call, in their order.
    """

    def __init__(
        self, session: Bound, player: Player, writer: ActionWriter, *, only_experts: bool, plays: bool
    ) -> None:
        self._session = session
        self._player = player
        self._writer = writer
        self._only_experts = only_experts
        self._plays = plays
        self.answers: list[Answer] = []

    async def answer(self, prompt: Prompt, sample: Callable[[], Awaitable[Sample]]) -> Sample:
        """See `StandIn`."""
        result = self._session.result
        intent: Distribution = self._player.intent(result)
        if self._only_experts and result.expert:
            intent = {result.expert: 1.0}
        given = self._said(prompt) if self._plays else await sample()
        intended = [([*self._writer.ids(action, prompt.tools)], chance) for action, chance in intent.items()]
        targets = [*next_tokens(given.token_ids, intended)]
        self.answers.append(Answer(prompt.ids.tolist(), given.token_ids, targets))
        return given

    def _said(self, prompt: Prompt) -> Sample:
        """The player's action as an answer. Raises EpisodeFailed."""
        action = self._player.act(self._session.result)
        if action is None:
            raise EpisodeFailed("the scripted player has nothing to do")
        ids = [*self._writer.ids(action, prompt.tools)]
        return Sample(ids, [0.0] * len(ids), (VersionSpan(0, len(ids)),), self._writer.text(ids), True)


class Renumbering:
    """Replaces the numbers of things in rows of tokens, where a name with its number is one token.

    The row is then that of an episode with other numbers: naming a thing becomes copying it.

    Args:
        tokenizer: of the policy. One without such tokens replaces nothing.

    Example: ` desk 1` and ` desk 2` may become ` desk 3` and ` desk 1` throughout a row.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._kinds: dict[str, list[int]] = {}
        self._kind: dict[int, str] = {}
        for text, id in sorted(tokenizer.get_added_vocab().items()):
            if found := _NUMBERED_NAME.fullmatch(text):
                self._kinds.setdefault(found[1], []).append(id)
                self._kind[id] = found[1]

    def __call__(self, row: Example, rng: random.Random) -> Example:
        """The row with other numbers."""
        new: dict[int, int] = {}
        for kind in dict.fromkeys(self._kind[token] for token in row.tokens if token in self._kind):
            ids = self._kinds[kind]
            new |= dict(zip(ids, rng.sample(ids, len(ids)), strict=True))
        tokens = [new.get(token, token) for token in row.tokens]
        targets: list[Mapping[int, float]] = [
            {new.get(token, token): chance for token, chance in wanted.items()} for wanted in row.targets
        ]
        return Example(tokens, targets)


def texts_of(rows: Sequence[Example], tokenizer: Any, markers: Sequence[str]) -> Iterator[str]:
    """The texts of rows between the markers of the chat template: what a tokenizer has to write."""
    between = re.compile("|".join(map(re.escape, markers)))
    for row in rows:
        yield from filter(None, between.split(tokenizer.decode(row.tokens, skip_special_tokens=False)))
