"""What a scripted player answers to an agent's calls, and rows with other numbers."""

from __future__ import annotations

import random
from typing import Any

import pytest

from actors.gateway.messages import Message, ToolCall
from actors.imitation import NoToolForActions, Renumbering, answer_of, texts_of
from actors.scripted import Answer, Example, rows_of
from learner.warmstart import CHAT_MARKERS, train_tokenizer
from tests.actors.gateway.scene import ACT

TEXTS = ["go to desk 1, go to desk 2, go to desk 3, go to bed 1; look, take pen 2 from desk 1"] * 60


def tool(name: str, parameters: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def test_an_action_is_a_call_of_the_tool_that_takes_one_text() -> None:
    wait = tool("wait", {"type": "object", "properties": {"seconds": {"type": "number"}}, "required": ["seconds"]})
    expected = Message("assistant", tool_calls=(ToolCall("act", '{"action": "look"}'),))
    assert answer_of("look", [wait, ACT]) == expected
    say = {"type": "object", "properties": {"text": {"type": "string"}, "loud": {"type": "boolean"}}}
    said = Message("assistant", tool_calls=(ToolCall("say", '{"text": "look"}'),))
    assert answer_of("look", [tool("say", {**say, "required": ["text"]})]) == said


def test_an_agent_without_tools_reads_texts() -> None:
    assert answer_of("look", []) == Message("assistant", "look")


@pytest.mark.parametrize("parameters", [None, {}, {"properties": {"a": {"type": "string"}, "b": {"type": "string"}}}])
def test_a_tool_that_takes_something_else_is_refused(parameters: object) -> None:
    with pytest.raises(NoToolForActions, match="one text"):
        answer_of("look", [tool("act", parameters)])


def test_calls_that_continue_one_another_are_one_row() -> None:
    calls = [
        Answer([1, 2], [7, 9], [{7: 1.0}, {9: 1.0}]),
        Answer([1, 2, 7, 9, 3], [8, 9], [{8: 0.5, 7: 0.5}, {9: 1.0}]),
        Answer([4], [5], [{5: 1.0}]),
    ]
    first, second = rows_of(calls)
    assert first.tokens == [1, 2, 7, 9, 3, 8, 9]
    assert first.targets == [{}, {}, {7: 1.0}, {9: 1.0}, {}, {8: 0.5, 7: 0.5}, {9: 1.0}]
    assert (second.tokens, second.targets) == ([4, 5], [{}, {5: 1.0}])


def test_a_row_with_other_numbers_is_that_of_a_text_with_other_numbers() -> None:
    tokenizer = train_tokenizer(TEXTS, 400)
    text = TEXTS[0]
    ids, desk, pen = tokenizer.encode(text), tokenizer.encode(" desk 1")[0], tokenizer.encode(" pen 2")[0]
    row = Example(ids, [{desk: 0.5, pen: 0.5}] * len(ids))
    renumbering, seen = Renumbering(tokenizer), set()
    for seed in range(30):
        other = renumbering(row, random.Random(seed))
        said = tokenizer.decode(other.tokens)
        assert tokenizer.encode(said) == other.tokens
        number = tokenizer.decode(next(token for token in other.targets[0] if token != pen)).split()[1]
        assert said.endswith(f" from desk {number}")
        seen.add(number)
    assert seen == {"1", "2", "3"}


def test_phrases_between_names_become_tokens_and_texts_survive() -> None:
    tokenizer = train_tokenizer(TEXTS, 400, phrases=3)
    words = [tokenizer.decode([id]) for id in tokenizer.encode(TEXTS[0])]
    assert words[:5] == ["go to", " desk 1", ", go to", " desk 2", ", go to"]
    assert "; look, take" in words
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]


def test_a_tokenizer_learns_what_stands_between_the_markers() -> None:
    tokenizer = train_tokenizer(TEXTS, 400, chat=True)
    row = Example(tokenizer.encode("<|user|>look<|assistant|><tool_call>go to desk 1</tool_call>"), [])
    assert [*texts_of([row], tokenizer, CHAT_MARKERS)] == ["look", "go to desk 1"]
