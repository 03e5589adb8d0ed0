"""Texts and typed actions: which field takes the text, what becomes the observation's text."""

from __future__ import annotations

from typing import Any

import pytest

from env_servers.client import RequestRejected
from env_servers.openenv.mapping import ActionMapping, Tool, observe

TEXT = {"type": "string"}
NUMBER = {"type": "integer"}


def schema(required: list[str], **properties: dict[str, str]) -> dict[str, Any]:
    return {"properties": {"metadata": {"type": "object"}, **properties}, "required": required}


@pytest.mark.parametrize(
    ("given", "text", "action"),
    [
        (schema(["message"], message=TEXT), "hi", {"message": "hi"}),
        (schema([], code=TEXT, limit=NUMBER), "1+1", {"code": "1+1"}),
        (schema(["code"], code=TEXT, language=TEXT), "1+1", {"code": "1+1"}),
        (schema(["a", "b"], a=TEXT, b=NUMBER), '{"a": "x", "b": 1}', {"a": "x", "b": 1}),
        (schema(["message"], message=TEXT), "{not json}", {"message": "{not json}"}),
    ],
)
def test_texts_become_actions(given: dict[str, Any], text: str, action: dict[str, Any]) -> None:
    assert ActionMapping(given).action(text, []) == action


@pytest.mark.parametrize("given", [schema(["a", "b"], a=TEXT, b=NUMBER), schema(["n"], n=NUMBER), {}])
def test_where_no_field_takes_a_text_json_is_asked_for(given: dict[str, Any]) -> None:
    with pytest.raises(RequestRejected, match="JSON object"):
        ActionMapping(given).action("hello", [])


def test_the_field_can_be_named() -> None:
    assert ActionMapping(schema([], a=TEXT, b=TEXT), "b").action("x", []) == {"b": "x"}


def test_a_tools_text_argument() -> None:
    assert Tool(name="t", input_schema=schema(["q"], q=TEXT)).text_argument == "q"
    assert Tool(name="t", input_schema=schema(["q", "n"], q=TEXT, n=NUMBER)).text_argument is None
    assert Tool(name="t").text_argument is None


@pytest.mark.parametrize(
    ("observation", "text"),
    [
        ({"text": "a", "other": "b"}, "a"),
        ({"only": "a", "number": 3}, "a"),
        ({"stdout": "a", "stderr": "b"}, "a"),
        ({"x": "a", "y": "b"}, '{"x": "a", "y": "b"}'),
        ({"result": {"data": "a"}}, "a"),
        ({"result": {"data": [1]}, "tool_name": "t"}, "[1]"),
        ({"error": {"message": "a"}, "result": None}, "a"),
        ({"metadata": {"status": "ready"}}, '{"status": "ready"}'),
        ({}, ""),
    ],
)
def test_the_observations_text(observation: dict[str, Any], text: str) -> None:
    assert observe({"observation": observation, "reward": None, "done": False}).text == text


def test_the_text_field_can_be_named() -> None:
    assert observe({"observation": {"text": "a", "html": "b"}}, "html").text == "b"


def test_endings_choices_and_facts() -> None:
    seen = observe(
        {
            "observation": {
                "text": "t",
                "terminated": False,
                "truncated": True,
                "legal_actions": ["b", "a"],
                "turn": 3,
                "facts": {"won": False},
            },
            "reward": True,
            "done": True,
        }
    )
    assert (seen.terminated, seen.truncated, seen.reward) == (False, True, 1.0)
    assert (seen.admissible, seen.facts) == (("a", "b"), {"turn": 3, "won": False})
    assert observe({"observation": {"legal_actions": [1, 2]}, "done": True}).terminated
    assert observe({"observation": {"legal_actions": [1, 2]}}).admissible is None


@pytest.mark.parametrize(("reward", "number"), [(None, 0.0), (True, 1.0), (2, 2.0), (-0.5, -0.5)])
def test_rewards(reward: object, number: float) -> None:
    assert observe({"observation": {}, "reward": reward}).reward == number


@pytest.mark.parametrize("reward", ["1", [], {}, float("inf"), float("nan")])
def test_a_reward_that_is_no_finite_number_is_refused(reward: object) -> None:
    with pytest.raises(RequestRejected, match="no finite number"):
        observe({"observation": {}, "reward": reward})
