"""Prompts of conversations: what was sampled stands in them as it was sampled, whatever clients do to it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from actors.gateway.conversation import Conversation, Prompt
from actors.gateway.read import AnswerReader
from actors.gateway.render import Renderer
from tests.actors.gateway.agents import Agent, Branch
from tests.actors.gateway.families import TEMPLATES, tokenizer
from tests.tiers import SHORT

CONVERSATIONS = 120 if SHORT else 2000
"""Over all families; of six calls each."""
CALLS = 6


@pytest.fixture(params=list(TEMPLATES), scope="module")
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@dataclass
class Spied:
    """What the tokenizer was asked to encode."""

    texts: list[str] = field(default_factory=list)

    def on(self, renderer: Renderer) -> Renderer:
        encode = renderer.tokens._encode

        def spied(text: str) -> tuple[int, ...]:
            self.texts.append(text)
            return encode(text)

        renderer.tokens._encode = spied
        return renderer


@dataclass
class Played:
    """What came of random episodes."""

    calls: int = 0
    continued: int = 0
    extended: int = 0
    broken: Counter[str] = field(default_factory=Counter)


def play(family: str, renderer: Renderer, spied: Spied, seed: int, played: Played) -> None:
    """One random episode; every prompt is compared with what the engine saw before."""
    reader, conversation = AnswerReader(renderer), Conversation(renderer)
    agent = Agent(family, renderer.tokenizer, seed)
    saw: dict[int, np.ndarray] = {}
    words: dict[int, str] = {}
    for number in range(CALLS):
        branch = agent.next()
        spied.texts.clear()
        prompt = conversation.ask(branch.messages, branch.tools)
        check(branch, prompt, saw, words, spied, played)
        turn = agent.answer(branch)
        reading = reader.read(prompt.begun, turn.ids, finished=turn.finished, tools=branch.tools)
        assert reading.valid or not turn.whole
        conversation.answered(number, prompt, turn.ids, reading)
        end = [turn.ids[-1]] if turn.finished else []
        # A token that ends an answer belongs to the next prompt where the template writes the same one.
        saw[number] = np.concatenate([prompt.ids, np.asarray(turn.ids[: len(turn.ids) - len(end)], dtype=np.int32)])
        words[number] = turn.word
        agent.went_on(branch, number, reading.message, turn)


def check(
    branch: Branch, prompt: Prompt, saw: dict[int, Any], words: dict[int, str], spied: Spied, played: Played
) -> None:
    played.calls += 1
    played.broken[prompt.broken] += 1
    if branch.expects is None:
        return
    assert prompt.extends == branch.expects
    if branch.expects >= 0:
        played.continued += 1
        before = saw[branch.expects]
        played.extended += np.array_equal(prompt.ids[: len(before)], before)
    encoded = "".join(spied.texts)
    assert not any(word in encoded for word in words.values())


def test_what_was_sampled_is_never_encoded_again_and_prompts_extend(family: str) -> None:
    spied = Spied()
    renderer = spied.on(Renderer(tokenizer(family), history="sampled"))
    played = Played()
    for seed in range(CONVERSATIONS // len(TEMPLATES)):
        play(family, renderer, spied, seed, played)
    assert played.continued > played.calls // 2
    assert played.extended == played.continued
    assert {"", "edited"} <= {*played.broken}
