"""Answers: thoughts, content and calls; and what is no call is content, all of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from actors.gateway.messages import Message, ToolCall
from actors.gateway.read import AnswerReader, Reading
from actors.gateway.render import Renderer
from services.plugins import PluginError
from tests.actors.gateway.agents import tool
from tests.actors.gateway.families import CALLS_AT_ONCE, TEMPLATES, WITH_THOUGHTS, stop, tokenizer, written

TOOLS = [tool("act"), tool("look")]
ARGUMENTS: dict[str, object] = {"action": "go\n to 漢", "count": "{1, 2} "}


def reader(family: str, name: str = "auto") -> AnswerReader:
    return AnswerReader(Renderer(tokenizer(family), history="sampled"), name)


def read(
    family: str, text: str, *, name: str = "auto", end: str | None = None, begun: str = "", **options: Any
) -> Reading:
    tokens = tokenizer(family)
    ids = tokens.encode(text, add_special_tokens=False)
    if options.setdefault("finished", True) and "stop" not in options:
        ids.append(tokens.convert_tokens_to_ids(end or stop(family, "call" in text)))
    renderer = Renderer(tokens, history="sampled")
    begun = begun or renderer.whole([Message("user", "Hi")], "").begun
    return AnswerReader(renderer, name).read(begun, ids, **({"tools": TOOLS} | options))


@pytest.mark.parametrize("family", TEMPLATES)
def test_what_a_family_writes_is_read(family: str) -> None:
    thought = "I think." if family in WITH_THOUGHTS else ""
    count = CALLS_AT_ONCE[family]
    text = written(family, thought, "", [("act", {**ARGUMENTS, "count": str(n)}) for n in range(count)])
    reading = read(family, text, end=stop(family, True))
    assert [(call.name, json.loads(call.arguments)) for call in reading.message.tool_calls] == [
        ("act", {**ARGUMENTS, "count": str(n)}) for n in range(count)
    ]
    assert (reading.message.content, reading.message.reasoning) == ("", thought)
    assert (reading.finish_reason, reading.valid, reading.unreadable) == ("tool_calls", True, "")
    reading = read(family, written(family, thought, "Hello, {you}.", []), end=stop(family, False))
    assert reading.message == Message("assistant", "Hello, {you}.", thought)
    assert (reading.finish_reason, reading.valid) == ("stop", True)


BROKEN = {
    "chatml": [
        '<tool_call>\n{"name": "act", "arguments": {"action": "a"}\n</tool_call>',
        '<tool_call>\n{"name": "act", "arguments": {"action": "a"}}',
        '<tool_call>\n{"name": "act"}\n</tool_call>',
        '<tool_call>\n{"arguments": {}}\n</tool_call>',
        '<tool_call>\n["act"]\n</tool_call>',
        '<tool_call>\n{"name": "act", "arguments": {"count": NaN}}\n</tool_call>',
        '<tool_call>\n{"name": "act", "arguments": ' + "[" * 3000 + "]" * 3000 + "}\n</tool_call>",
        '<tool_call>\n{"name": "act", "arguments": {"a": 1' + "0" * 5000 + "}}\n</tool_call>",
        'Well. <tool_call>\n{"name": "act", "arguments": {}}\n</tool_call>\n<tool_call>\n{"na',
    ],
    "llama": ['{"name": "act", "parameters": {"action": "a"}', '{"name": "act", "arguments": {}}'],
    "mistral": ['[TOOL_CALLS][{"name": "act", "arguments": {"action": "a"}]'],
    "glm": ["<tool_call>act\n<arg_key>action</arg_key>\n<arg_value>a\n</tool_call>", "<tool_call>act\n"],
    "harmony": [' to=functions.act<|channel|>commentary json<|message|>{"action": "a"'],
}


@pytest.mark.parametrize(("family", "text"), [(family, text) for family, texts in BROKEN.items() for text in texts])
def test_what_is_no_call_is_content(family: str, text: str) -> None:
    reading = read(family, text, end=stop(family, True))
    assert reading.message == Message("assistant", text)
    assert (reading.finish_reason, reading.valid) == ("stop", False)
    assert reading.unreadable


def test_calls_in_tags_whose_arguments_would_be_lost_are_content() -> None:
    whole = "<tool_call>\n<function=act>\n<parameter=action>\ngo  1\n</parameter>\n</function>\n</tool_call>"
    (call,) = read("chatml", whole, name="xml").message.tool_calls
    assert call.parsed() == {"action": "go  1"}
    for odd in (whole.replace("</parameter>\n", ""), whole.replace("</function>", "junk</function>"), whole[:-5]):
        assert read("chatml", odd, name="xml").message == Message("assistant", odd)
    empty = "<tool_call>\n<function=look>\n</function>\n</tool_call>"
    assert read("chatml", empty, name="xml").message.tool_calls == (ToolCall("look", "{}"),)


def test_values_in_tags_have_the_types_of_the_tools_schema() -> None:
    counting = {"name": "count", "parameters": {"type": "object", "properties": {"number": {"type": "integer"}}}}
    text = "<tool_call>\n<function=count>\n<parameter=number>\n7\n</parameter>\n</function>\n</tool_call>"
    reading = read("chatml", text, name="xml", tools=[{"type": "function", "function": counting}])
    assert reading.message.tool_calls[0].parsed() == {"number": 7}


def test_an_answer_that_was_cut_is_not_valid() -> None:
    call = written("chatml", "", "", [("act", ARGUMENTS)])
    cut = read("chatml", call[:-3], finished=False)
    assert (cut.message, cut.finish_reason, cut.valid) == (Message("assistant", call[:-3]), "length", False)
    thinking = read("thinking", "I think that", finished=False)
    assert (thinking.message, thinking.valid) == (Message("assistant", "", "I think that"), False)


def test_calls_of_unknown_tools_are_delivered_but_not_valid() -> None:
    reading = read("chatml", written("chatml", "", "", [("jump", {})]))
    assert (reading.message.tool_calls, reading.valid) == ((ToolCall("jump", "{}"),), False)
    listed = read("chatml", '<tool_call>\n{"name": "act", "arguments": [1]}\n</tool_call>')
    assert (listed.message.tool_calls, listed.valid) == ((ToolCall("act", "[1]"),), False)


def test_without_tools_a_call_is_text() -> None:
    text = written("chatml", "", "", [("act", ARGUMENTS)])
    reading = read("chatml", text, tools=[])
    assert (reading.message, reading.valid) == (Message("assistant", text), True)


def test_the_first_of_several_calls_can_be_asked_for() -> None:
    text = written("chatml", "", "Both.", [("act", {}), ("look", {})])
    assert [call.name for call in read("chatml", text).message.tool_calls] == ["act", "look"]
    reading = read("chatml", text, parallel=False)
    assert reading.message == Message("assistant", "Both.", tool_calls=(ToolCall("act", "{}"),))


def test_text_around_calls_is_content() -> None:
    text = 'One.\n<tool_call>\n{"name": "act", "arguments": {}}\n</tool_call>\nTwo.'
    assert read("chatml", text).message == Message("assistant", "One.\nTwo.", tool_calls=(ToolCall("act", "{}"),))


def test_a_stop_string_cuts_the_text_and_keeps_the_tokens_before_it() -> None:
    tokens = tokenizer("chatml")
    parts = ["You see", " a pen", ". END", " more"]
    ids = [tokens.encode(part, add_special_tokens=False) for part in parts]
    flat = [id for part in ids[:3] for id in part]
    reading = AnswerReader(Renderer(tokens)).read("", flat, finished=True, stop="END")
    assert reading.message.content == "You see a pen."
    assert tokens.decode(flat[: reading.kept]) + reading.leftover == "You see a pen. "
    whole = AnswerReader(Renderer(tokens)).read("", ids[0] + ids[1], finished=True, stop=" a pen")
    assert (whole.message.content, whole.kept, whole.leftover) == ("You see", len(ids[0]), "")
    none = AnswerReader(Renderer(tokens)).read("", ids[0], finished=True, stop="You")
    assert (none.message.content, none.kept, none.leftover) == ("", 0, "")


def test_how_calls_are_read_is_found_out() -> None:
    names = {family: reader(family).name for family in TEMPLATES}
    own = "the model's response_template"
    assert names == {"chatml": "hermes", "thinking": "hermes", "llama": "llama3"} | dict.fromkeys(
        ("mistral", "glm", "harmony"), own
    )
    assert reader("chatml", "xml").name == "xml"


OWN = """
from actors.gateway.messages import Message, ToolCall

class Shouting:
    def __init__(self, tokenizer): pass
    def read(self, text, begun, tools):
        if "!" not in text: raise ValueError("nobody shouts")
        return Message("assistant", tool_calls=(ToolCall("act", '{"action": "' + text + '"}'),))

class Silent(Shouting):
    def read(self, text, begun, tools): return text

class Deaf:
    def __init__(self, tokenizer): pass
"""


def test_a_reader_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    assert read("chatml", "Go!", name=f"{file}:Shouting").message.tool_calls == (ToolCall("act", '{"action": "Go!"}'),)
    quiet = read("chatml", "Go.", name=f"{file}:Shouting")
    assert (quiet.message, quiet.valid, quiet.unreadable) == (Message("assistant", "Go."), False, "nobody shouts")
    with pytest.raises(PluginError, match="read must return an assistant's Message, got 'Go'"):
        read("chatml", "Go", name=f"{file}:Silent")
    with pytest.raises(PluginError, match="has no method 'read'"):
        reader("chatml", f"{file}:Deaf")
