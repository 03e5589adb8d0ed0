"""Texts and typed actions: which field takes the text, what becomes the observation's text."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from env_servers.client import RequestRejected
from env_servers.clients.openenv_examples import example
from env_servers.clients.openenv_mapping import ActionMapping, Tool, failure_of, observe

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
        (schema(["message"], message=TEXT), '{"message": "hi"}', {"message": "hi"}),
        (schema(["message"], message=TEXT), '{"other": "hi"}', {"message": '{"other": "hi"}'}),
        (schema(["message"], message=TEXT), " {}\n", {"message": " {}\n"}),
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
        ({"error": "a", "text": "b"}, "b\na"),
        ({"stdout": "", "stderr": "b"}, "b"),
        ({"result": {"data": None, "content": [{"type": "text", "text": "a"}]}}, "a"),
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
    with pytest.raises(RequestRejected, match="not a finite number"):
        observe({"observation": {}, "reward": reward})


@pytest.mark.parametrize(
    ("observation", "accepted"),
    [
        ({"text": "fine"}, True),
        ({"text": "fine", "error": None}, True),
        ({"text": "fine", "error": ""}, True),
        ({"error": {"error_type": "invalid_args", "message": "m"}}, False),
        ({"error": {"error_type": "tool_not_found"}}, False),
        ({"error": {"error_type": "timeout", "message": "m"}}, True),
        ({"error": {"code": -32602, "message": "m"}}, False),
        ({"error": "unknown command", "text": "t"}, False),
        ({"result": {"is_error": True, "data": None, "content": []}}, False),
        ({"text": "t", "accepted": False}, False),
    ],
)
def test_an_error_says_that_the_action_was_none(observation: dict[str, Any], accepted: bool) -> None:
    seen = observe({"observation": observation, "reward": None, "done": False})
    assert seen.accepted is accepted
    assert "accepted" not in seen.facts


def test_an_error_in_place_of_an_observation() -> None:
    assert failure_of({"error": {"code": -32602, "message": "Invalid params"}}) == "Invalid params"
    assert failure_of({"observation": {"error": "x"}}) is None


NESTED = {
    "$defs": {"Place": {"properties": {"x": {"type": "integer", "minimum": 3, "maximum": 4}}, "required": ["x"]}},
    "properties": {
        "where": {"$ref": "#/$defs/Place"},
        "how": {"enum": ["fast", "slow"]},
        "list": {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}, "minItems": 2},
        "maybe": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        "kind": {"const": "move"},
        "note": {"type": "string", "minLength": 9, "maxLength": 12},
        "extra": {"type": "string"},
    },
    "required": ["where", "how", "list", "maybe", "kind", "note"],
}


@pytest.mark.parametrize("seed", range(20))
def test_examples_fit_their_schema(seed: int) -> None:
    made = example(NESTED, random.Random(seed))
    assert made["where"]["x"] in (3, 4)
    assert made["how"] in ("fast", "slow")
    assert len(made["list"]) >= 2
    assert all(isinstance(number, float) and number > 0 for number in made["list"])
    assert isinstance(made["maybe"], bool)
    assert made["kind"] == "move"
    assert 9 <= len(made["note"]) <= 12
    assert made.keys() - {"extra"} == set(NESTED["required"])


def test_examples_of_actions() -> None:
    assert ActionMapping(schema(["message"], message=TEXT)).examples([], 3, 0) == []
    assert "print" in "".join(ActionMapping(schema(["code"], code=TEXT)).examples([], 20, 0))
    made = ActionMapping(schema(["a", "b"], a=TEXT, b=NUMBER)).examples([], 3, 0)
    assert all(isinstance(json.loads(action)["b"], int) for action in made)
