"""Anthropic's Messages API: the same episode through it, and that its requests become those of the other routes."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from actors.gateway.anthropic import messages_request
from actors.gateway.errors import Refused
from actors.gateway.messages import Message, ToolCall
from actors.gateway.wire import Rules
from tests.actors.gateway.scene import ACT, Scene, act

MESSAGES = "/v1/messages"
TOOL = {"name": "act", "description": "", "input_schema": ACT["function"]["parameters"]}
ASK: dict[str, Any] = {
    "model": "claude",
    "max_tokens": 1000,
    "system": [{"type": "text", "text": "You count."}],
    "tools": [TOOL],
    "messages": [{"role": "user", "content": "The count is 0."}],
}
RULES = Rules(temperature=0.7, max_response_tokens=64)


def client_of(scene: Scene, key: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=scene.url, headers={"x-api-key": key}, timeout=60, trust_env=False)


async def test_an_answer_is_content_blocks_and_comes_back(scene: Scene) -> None:
    session, _ = await scene.bound()
    http = client_of(scene, scene.key(session))
    scene.sampler.told.append("I count.\n" + act("up"))
    first = (await http.post(MESSAGES, json=ASK)).json()
    assert (first["type"], first["role"], first["stop_reason"]) == ("message", "assistant", "tool_use")
    text, use = first["content"]
    assert (text["type"], text["text"].strip()) == ("text", "I count.")
    assert (use["type"], use["name"], use["input"]) == ("tool_use", "act", {"action": "up"})
    assert first["usage"]["input_tokens"] == len(scene.sampler.prompts[0])
    results = [{"type": "tool_result", "tool_use_id": use["id"], "content": [{"type": "text", "text": "1."}]}]
    more = [{"role": "assistant", "content": first["content"]}, {"role": "user", "content": results}]
    second = await http.post(MESSAGES, json={**ASK, "messages": [*ASK["messages"], *more]})
    assert second.status_code == 200
    assert [step.extends for step in session.record.steps()] == [-1, 0]


async def test_a_stream_adds_up_to_the_plain_answer(scene: Scene) -> None:
    session, _ = await scene.bound()
    http = client_of(scene, scene.key(session))
    for text in ("Hello 漢字", "I count.\n" + act("up"), act("down"), ""):
        scene.sampler.told.extend([text, text])
        plain = (await http.post(MESSAGES, json=ASK)).json()
        response = await http.post(MESSAGES, json={**ASK, "stream": True})
        events = [json.loads(part.split("\ndata: ")[1]) for part in response.text.strip().split("\n\n")]
        assert [event["type"] for event in events][:2] == ["message_start", "ping"]
        assert events[-1]["type"] == "message_stop"
        assert _blocks(events) == [_plain(block) for block in plain["content"]]
        (ended,) = [event for event in events if event["type"] == "message_delta"]
        assert ended["delta"]["stop_reason"] == plain["stop_reason"]
        assert ended["usage"]["output_tokens"] == plain["usage"]["output_tokens"]


def _plain(block: dict[str, Any]) -> tuple[str, str]:
    return block["type"], json.dumps(block["input"]) if block["type"] == "tool_use" else block["text"]


def _blocks(events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    kinds: dict[int, str] = {}
    texts: dict[int, str] = {}
    for event in events:
        if event["type"] == "content_block_start":
            kinds[event["index"]], texts[event["index"]] = event["content_block"]["type"], ""
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            texts[event["index"]] += delta.get("text", delta.get("partial_json", ""))
    return [
        (kind, json.dumps(json.loads(texts[index])) if kind == "tool_use" else texts[index])
        for index, kind in kinds.items()
    ]


async def test_tokens_are_counted_without_a_call(scene: Scene) -> None:
    session, _ = await scene.bound()
    http = client_of(scene, scene.key(session))
    asked = {name: value for name, value in ASK.items() if name != "max_tokens"}
    counted = (await http.post(f"{MESSAGES}/count_tokens", json=asked)).json()
    assert session.record.calls == []
    used = (await http.post(MESSAGES, json=ASK)).json()["usage"]["input_tokens"]
    assert counted == {"input_tokens": used}


@pytest.mark.parametrize(
    ("extra", "status", "kind"),
    [
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400, "invalid_request_error"),
        ({"messages": "x"}, 400, "invalid_request_error"),
        ({"messages": [5]}, 400, "invalid_request_error"),
        ({"system": [5]}, 400, "invalid_request_error"),
    ],
)
async def test_refusals_have_anthropics_form(scene: Scene, extra: dict[str, Any], status: int, kind: str) -> None:
    session, _ = await scene.bound()
    http = client_of(scene, scene.key(session))
    response = await http.post(MESSAGES, json={**ASK, **extra})
    assert (response.status_code, response.headers["x-should-retry"]) == (status, "false")
    body = response.json()
    assert (body["type"], body["error"]["type"]) == ("error", kind)


def test_requests_are_translated() -> None:
    body = {
        **ASK,
        "stop_sequences": ["END"],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "text", "text": "c"},
                    {"type": "tool_use", "id": "t1", "name": "act", "input": {"action": "up"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "1."},
                    {"type": "text", "text": "Go."},
                ],
            },
        ],
    }
    request = messages_request(body, {}, RULES)
    assert request.messages == (
        Message("system", "You count."),
        Message("user", "ab"),
        Message("assistant", "c", "hm", (ToolCall("act", '{"action":"up"}', "t1"),)),
        Message("tool", "1.", tool_call_id="t1"),
        Message("user", "Go."),
    )
    assert (request.stop, request.parallel, request.max_tokens) == (("END",), False, 64)
    assert request.tools[0]["function"] == {"name": "act", "description": "", "parameters": TOOL["input_schema"]}
    with pytest.raises(Refused, match="tool_choice=a named tool"):
        messages_request({**ASK, "tool_choice": {"type": "tool", "name": "act"}}, {}, RULES)
