"""Random agents: what clients do to conversations, and what policies write.

An agent keeps branches: conversations as its client sends them, each with the number of the call that its last answer
is. In each turn it picks a branch, sends it, is answered, and goes on: with the results of tools, with a user's
message, twice from the same state, in a sub-agent with tools of its own, from a summary, or after an edit.

Everything that the policy writes contains a word that occurs nowhere else (`Turn.word`).
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, replace
from typing import Any

from actors.gateway.messages import Message, Tool, ToolCall
from tests.actors.gateway.families import CALLS_AT_ONCE, WITH_THOUGHTS, stop, written

ODD = [
    "<|im_end|>",
    "<|im_start|>system\n",
    "[INST]",
    "<|user|>",
    "<|call|>",
    "</think>",
    "<tool_call>",
    "é ẞ 漢",
    "  ",
    '"}\n',
]


def tool(name: str) -> Tool:
    parameters = {"type": "object", "properties": {"action": {"type": "string"}, "count": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "description": f"{name} it.", "parameters": parameters}}


@dataclass(frozen=True)
class Branch:
    """A conversation as a client would send it next.

    `expects`: number of the call that it continues; None: whatever. `pure`: all of its answers are as they were
    sampled, so that its whole prompt is known.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    expects: int | None = -1
    pure: bool = True


@dataclass(frozen=True)
class Turn:
    """What the policy writes: ids, whether it ended by itself, and the word in it. `whole`: nothing odd about it."""

    ids: list[int]
    finished: bool
    word: str
    whole: bool


class Agent:
    """One episode's random client and policy."""

    def __init__(self, family: str, tokenizer: Any, seed: int) -> None:
        self.family = family
        self._added = tokenizer.get_added_vocab()
        self._backend = tokenizer.backend_tokenizer
        self._marker = re.compile("(" + "|".join(map(re.escape, sorted(self._added, key=len, reverse=True))) + ")")
        self._random = random.Random(seed)
        self._words = 0
        self.branches = [Branch(self._opening("main"), self._tools("act", "look"))]

    def next(self) -> Branch:
        """The branch whose turn it is, taken from the agent's."""
        return self.branches.pop(self._random.randrange(len(self.branches)))

    def answer(self, branch: Branch) -> Turn:
        """What the policy writes: a text or calls, sometimes malformed or cut, in tokens that no encoder would take."""
        rng, family = self._random, self.family
        self._words += 1
        word = f"quokka{self._words}zebra"
        names = [str(dict(one)["function"]["name"]) for one in branch.tools]  # type: ignore[index]
        calls: list[tuple[str, dict[str, object]]] = []
        if names and rng.random() < 0.6:
            count = rng.randint(1, CALLS_AT_ONCE[family])
            calls = [
                (rng.choice(names), {"action": f"go {word} {n}", "count": str(rng.random())}) for n in range(count)
            ]
        thought = f"I think {word}." if family in WITH_THOUGHTS else ""
        content = "" if calls and rng.random() < 0.7 else f"Say {word}. {rng.choice(['', 'Well.', '漢 é'])}".strip()
        text = written(family, thought, content, calls)
        kind = rng.random()
        whole = kind < 0.9
        if 0.9 <= kind < 0.95:
            text = text.replace('"arguments": {', '"arguments": {{').replace("</arg_value>", "").replace("s: {", "s: ")
        finished = kind < 0.95
        if not finished:
            text = text[: rng.randrange(len(word), len(text) + 1)]
        ids = self._scattered(text)
        if finished:
            ids.append(self._added[stop(family, bool(calls))])
        return Turn(ids, finished, word, whole)

    def went_on(self, branch: Branch, number: int, answer: Message, turn: Turn) -> None:
        """Let the client use the answer of a call; what it may send next becomes branches."""
        echoed = self._echoed(answer)
        pure = branch.pure and turn.whole
        said = (*branch.messages, *echoed, *self._results(answer))
        after = Branch(said, branch.tools, number, pure)
        self.branches.append(after)
        kind = self._random.random()
        if kind < 0.1:  # a fork: the same state goes on twice
            self.branches.append(Branch(self._nudged(said), branch.tools, number, pure))
        elif kind < 0.2:  # a sub-agent
            self.branches.append(Branch(self._opening("sub"), self._tools("find")))
        elif kind < 0.25:  # a summary takes the place of all
            self.branches[-1] = Branch(self._opening("summary"), branch.tools)
        elif kind < 0.3:  # the oldest turn is left out
            self.branches[-1] = Branch((*branch.messages[:2], *said[len(branch.messages) :]), branch.tools, None, False)
        elif kind < 0.35:  # something was edited
            self.branches[-1] = Branch(self._edited(said), branch.tools, None, False)

    def _scattered(self, text: str) -> list[int]:
        """Ids of a text that an encoder would not choose: it is encoded in random pieces."""
        ids: list[int] = []
        for part in filter(None, self._marker.split(text)):
            if part in self._added:
                ids.append(self._added[part])
                continue
            while part:
                length = self._random.choice([1, 2, 5, 100])
                ids += self._backend.encode(part[:length], add_special_tokens=False).ids
                part = part[length:]
        return ids

    def _echoed(self, answer: Message) -> tuple[Message, ...]:
        """The answer as a client sends it back."""
        rng = self._random
        calls = tuple(self._recalled(number, call) for number, call in enumerate(answer.tool_calls))
        echoed = replace(answer, tool_calls=calls)
        if rng.random() < 0.7:
            echoed = replace(echoed, reasoning="")
        if rng.random() < 0.3:
            echoed = replace(echoed, content=f"\n{echoed.content} ")
        if echoed.content.strip() and calls and rng.random() < 0.3:
            return replace(echoed, tool_calls=()), replace(echoed, content="", reasoning="")
        return (echoed,)

    def _recalled(self, number: int, call: ToolCall) -> ToolCall:
        """A call with another id, and its arguments written otherwise."""
        found = call.parsed()
        arguments = call.arguments
        if found is not None and self._random.random() < 0.5:
            arguments = json.dumps(dict(reversed(found.items())), separators=(",", ":"))
        return replace(call, id=f"call_{self._random.randrange(10**9)}_{number}", arguments=arguments)

    def _results(self, answer: Message) -> tuple[Message, ...]:
        if not answer.tool_calls:
            return (Message("user", self._text()),)
        return tuple(
            Message("tool", self._text(), tool_call_id=f"call_{number}", name=call.name)
            for number, call in enumerate(answer.tool_calls)
        )

    def _nudged(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        return (*messages[:-1], replace(messages[-1], content=self._text()))

    def _edited(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        place = self._random.randrange(1, len(messages))
        changed = replace(messages[place], content=f"edited {self._text()}")
        return (*messages[:place], changed, *messages[place + 1 :])

    def _opening(self, name: str) -> tuple[Message, ...]:
        return Message("system", f"You are {name} {self._text()}"), Message("user", f"Do it: {self._text()}")

    def _tools(self, *names: str) -> tuple[Tool, ...]:
        return tuple(tool(name) for name in names)

    def _text(self) -> str:
        rng = self._random
        words = ["You", "see", "a", "desk", "1", "and", "pen", *rng.sample(ODD, 2)]
        return " ".join([str(rng.randrange(10**6)), *rng.choices(words, k=rng.randint(1, 12)), "."])
