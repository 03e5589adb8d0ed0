"""What answers of servers of all kinds mean."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchorage.api_models.wire import (
    Problem,
    Reply,
    WrongAnswer,
    chat_messages,
    read_answer,
    read_problem,
    refusal_of,
    retry_after,
    unaccepted,
)


def body(message: object, finish_reason: str | None = "stop", usage: object = None) -> bytes:
    return json.dumps({"choices": [{"message": message, "finish_reason": finish_reason}], "usage": usage}).encode()


def test_turns_are_messages_in_turn() -> None:
    assert chat_messages(["You see a desk."]) == [{"role": "user", "content": "You see a desk."}]
    assert chat_messages(["a", " look", "b"]) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": " look"},
        {"role": "user", "content": "b"},
    ]


@given(st.lists(st.text(max_size=3), min_size=1, max_size=9))
def test_messages_alternate_none_is_empty_and_together_they_are_the_text(turns: list[str]) -> None:
    messages = chat_messages(turns)
    assert "".join(message["content"] for message in messages) == "".join(turns)
    roles = [message["role"] for message in messages]
    assert all(first != second for first, second in itertools.pairwise(roles))
    assert all(message["content"] for message in messages)


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        (body({"content": "up"}), Reply("up")),
        (body({"content": "up"}, "length"), Reply("up", finished=False)),
        (body({"content": [{"type": "thinking", "thinking": "…"}, {"type": "text", "text": "up"}]}), Reply("up")),
        (b'{"choices": [{"text": " up", "finish_reason": "stop"}]}', Reply(" up")),
        (body({"content": "a"}, usage={"prompt_tokens": 5, "completion_tokens": 2}), Reply("a", True, "", 5, 2)),
        (body({"content": "a"}, usage={"prompt_tokens": True, "completion_tokens": -1}), Reply("a")),
        (body({"content": "a"}, usage={"prompt_tokens": 1e99, "completion_tokens": "2"}), Reply("a")),
        (b'{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": NaN}}', Reply("a")),
        (body({"content": "a\ud800"}), Reply("a\ufffd")),
        (body({"content": None}), Reply("", refused="an empty response")),
        (body({"content": "", "tool_calls": [{}]}, "tool_calls"), Reply("", refused="an empty response")),
        (body({"content": None}, "length"), Reply("", False, "no text within the limit of tokens")),
        (body({"content": None, "refusal": "I will\nnot."}), Reply("", refused="the model refused: I will not.")),
        (body({"content": "half"}, "content_filter"), Reply("", refused="the server's filter stopped the response")),
    ],
)
def test_a_reply(answer: bytes, reply: Reply) -> None:
    assert read_answer(answer, thoughts=False) == reply


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "<think>a</think>up", "reasoning_content": "b"}, "<think>a</think>up"),
        ({"content": "up", "reasoning_content": "b"}, "<think>b</think>up"),
        ({"content": "up", "reasoning": "b"}, "<think>b</think>up"),
        ({"content": "b</think>up"}, "<think>b</think>up"),
        ({"content": "up", "reasoning": {"effort": "low"}}, "up"),
        ({"content": "up"}, "up"),
    ],
)
def test_a_thought_that_the_server_cut_off_is_put_back(message: dict[str, Any], text: str) -> None:
    assert read_answer(body(message), thoughts=True).text == text
    assert read_answer(body(message), thoughts=False).text == message["content"]


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (b"", "an empty body"),
        (b"<!DOCTYPE html><h1>Welcome</h1>", "a web page in place of an answer: <!DOCTYPE html>"),
        (b'data: {"choices": []}\n\ndata: [DONE]\n\n', "an event stream"),
        (b"\x00\xff\x1b[2J", "no JSON"),
        (b"[]", "no JSON object"),
        (b"NaN", "no JSON object"),
        (b"[" * 100_000, "no JSON"),
        (b"{}", "without choices"),
        (b'{"choices": []}', "without choices"),
        (b'{"choices": [1]}', "without choices"),
        (b'{"choices": {"0": {}}}', "without choices"),
        (b'{"choices": [{"message": null}]}', "without a message"),
        (b'{"choices": [{"message": {"content": 5}}]}', "no text"),
    ],
)
def test_what_is_no_answer_is_named_in_one_printable_line(answer: bytes, what: str) -> None:
    with pytest.raises(WrongAnswer) as wrong:
        read_answer(answer, thoughts=True)
    assert what in str(wrong.value)
    assert str(wrong.value).isprintable()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def reply_or_line(answer: bytes) -> Reply | str:
    try:
        return read_answer(answer, thoughts=True)
    except WrongAnswer as wrong:
        return str(wrong)


@given(choices=JSON, message=JSON, content=JSON, usage=JSON, error=JSON)
def test_nothing_but_a_reply_or_a_wrong_answer(
    choices: object, message: object, content: object, usage: object, error: object
) -> None:
    for tree in (
        choices,
        {"choices": choices, "usage": usage, "error": error},
        {"choices": [{"message": message, "finish_reason": content}], "usage": usage},
        {"choices": [{"message": {"content": content, "refusal": error, "reasoning": usage}}]},
    ):
        answer = json.dumps(tree).encode()
        problem = read_problem(answer)
        assert problem is None or problem.message.isprintable()
        reply = reply_or_line(answer)
        if isinstance(reply, str):
            assert reply.isprintable()
        else:
            assert bool(reply.text) != bool(reply.refused)


@given(st.binary(max_size=40))
def test_any_bytes_at_all(answer: bytes) -> None:
    read_problem(answer)
    with pytest.raises(WrongAnswer):
        read_answer(answer, thoughts=True)


def test_problems() -> None:
    openai = json.dumps({"error": {"message": "No such\nmodel", "code": "Model_Not_Found", "param": "model"}}).encode()
    assert read_problem(openai) == Problem("No such model", "model_not_found", "model")
    assert read_problem(b'{"detail": "Not Found"}') == Problem("Not Found")
    assert read_problem(b'{"error": "overloaded"}') == Problem("overloaded")
    assert read_problem(b'{"object": "error", "message": "bad", "code": 404}') == Problem("bad")
    assert read_problem(b'{"choices": [], "error": null}') is None


def test_the_prompt_or_the_filter_is_to_blame() -> None:
    too_long = Problem("This model's maximum context length is 8192 tokens.", "context_length_exceeded", "messages")
    assert "too long" in refusal_of(400, too_long)
    assert refusal_of(413, Problem("")) == "the prompt is too long: status 413"
    assert "filter" in refusal_of(400, Problem("The response was filtered", "content_filter"))
    assert refusal_of(400, Problem("Unsupported value: temperature", "unsupported_value", "temperature")) == ""
    assert refusal_of(401, Problem("wrong key")) == ""


def test_the_parameter_that_is_not_accepted() -> None:
    sent = {"temperature": 0.4, "seed": 1, "max_tokens": 5}
    optional = ("temperature", "seed")
    assert unaccepted(Problem("Unsupported value", "", "temperature"), sent, optional) == "temperature"
    assert unaccepted(Problem("extra fields not permitted: seed"), sent, optional) == "seed"
    assert unaccepted(Problem("Use 'max_completion_tokens' instead of max_tokens."), sent, optional) == "max_tokens"
    assert unaccepted(Problem("max_tokens must be positive"), sent, optional) is None
    assert unaccepted(Problem("temperature"), {"seed": 1}, optional) is None


def test_when_to_try_again() -> None:
    assert retry_after("2.5") == 2.5
    assert retry_after("Thu, 01 Jan 1970 00:01:00 GMT", now=50.0) == 10.0
    for nothing in ("", "soon", "nan", "inf", "-3", "Thu, 99 Jan 1970 00:01:00 GMT"):
        assert retry_after(nothing) == 0.0
