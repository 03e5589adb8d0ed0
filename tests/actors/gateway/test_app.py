"""Requests and responses over HTTP: answers, refusals, keys, retries, streams. The sampler is told what to say."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from actors.engine.interface import EngineFailed
from actors.gateway.errors import episode_ended, moved
from tests.actors.gateway.scene import ACT, TOKEN, Scene, act, agent_config, arguments_of, gateway, user

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "policy", "messages": [user("The count is 0.")], "tools": [ACT]}


async def test_an_answer_is_what_was_sampled_and_names_its_call(scene: Scene) -> None:
    session, http = await scene.bound()
    scene.sampler.told.append(act("up"))
    response = await http.post(CHAT, json={**ASK, "temperature": 0})
    body = response.json()
    assert (response.status_code, body["object"], body["model"]) == (200, "chat.completion", "policy")
    assert body["id"] == "train-17-0-0"
    (choice,) = body["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    (call,) = choice["message"]["tool_calls"]
    assert call["id"].startswith("call_")
    assert (call["type"], call["function"]["name"]) == ("function", "act")
    assert json.loads(call["function"]["arguments"]) == {"action": "up"}
    (prompt,), (answer,) = scene.sampler.prompts, scene.sampler.answers
    tokens = {"prompt_tokens": len(prompt), "completion_tokens": len(answer), "total_tokens": len(prompt) + len(answer)}
    assert body["usage"] == tokens
    assert {name: value for name, value in response.headers.items() if name.startswith("x-anchorage")} == {
        "x-anchorage-call": "0",
        "x-anchorage-turn": "0",
        "x-anchorage-version": "3",
        "x-anchorage-imposed": "temperature",
    }
    assert scene.sampler.settings[0]["temperature"] == 0.7
    assert [call.delivered for call in session.record.calls] == [True]


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("n", 4, "unsupported_in_training"),
        ("best_of", 2, "unsupported_in_training"),
        ("echo", True, "unsupported_in_training"),
        ("suffix", "x", "unsupported_in_training"),
        ("use_beam_search", True, "unsupported_in_training"),
        ("prompt_logprobs", 1, "unsupported_in_training"),
        ("top_logprobs", 5, "unsupported_in_training"),
        ("chat_template", "{{ messages }}", "unsupported_in_training"),
        ("audio", {"voice": "alloy"}, "unsupported_in_training"),
        ("modalities", ["text", "audio"], "unsupported_in_training"),
        ("functions", [{"name": "act"}], "unsupported_in_training"),
        ("response_format", {"type": "json_object"}, "constrained_decoding"),
        ("tool_choice", "required", "constrained_decoding"),
        ("tool_choice", {"type": "function", "function": {"name": "act"}}, "constrained_decoding"),
        ("structured_outputs", {"json": {}, "regex": "a"}, "constrained_decoding"),
        ("guided_json", {"type": "object"}, "constrained_decoding"),
        ("allowed_token_ids", [1], "constrained_decoding"),
        ("bad_words", ["no"], "constrained_decoding"),
        ("min_tokens", 5, "constrained_decoding"),
        ("stop", ["a"] * 5, "invalid_value"),
        ("stop", ["a" * 65], "invalid_value"),
        ("stop", [""], "invalid_value"),
        ("max_tokens", 0, "invalid_value"),
        ("max_tokens", "many", "invalid_value"),
        ("messages", [], "invalid_value"),
        ("messages", "hello", "invalid_value"),
        ("messages", [user("a")] * 2049, "invalid_value"),
        ("messages", [{"role": "robot", "content": "a"}], "invalid_value"),
        ("messages", [{"role": "user", "content": 5}], "invalid_value"),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "unsupported_content"),
        ("messages", [{"role": "assistant", "tool_calls": [{"id": "x"}]}], "invalid_value"),
        ("tools", [ACT] * 129, "invalid_value"),
        ("tools", [{"type": "web_search"}], "invalid_value"),
        ("messages", [user("word " * 3000)], "context_length_exceeded"),
    ],
)
async def test_what_cannot_be_trained_is_refused_for_good(scene: Scene, field: str, value: object, code: str) -> None:
    session, http = await scene.bound()
    response = await http.post(CHAT, json={**ASK, field: value})
    assert (response.status_code, response.headers["x-should-retry"]) == (400, "false")
    error = response.json()["error"]
    assert error["code"] == code
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert "\n" not in error["message"]
    assert (session.record.calls, scene.sampler.prompts) == ([], [])
    assert session.counts["refused"] == 1


@pytest.mark.parametrize(
    ("extra", "imposed"),
    [
        ({"temperature": 0, "top_p": 0.5, "seed": 4, "logit_bias": {"5": 1}}, "temperature,top_p,logit_bias,seed"),
        ({"top_k": 5, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 2}, None),
        ({"temperature": 0.7, "top_p": 1, "n": 1, "top_k": -1, "tool_choice": "auto", "logit_bias": None}, ""),
        ({"tools": [{"type": "function", "function": {"name": "act", "strict": True}}]}, "tools.strict"),
        ({"user": "me", "store": True, "service_tier": "auto", "response_format": {"type": "text"}, "x": 1}, ""),
    ],
)
async def test_sampling_is_the_runs_and_the_response_says_so(
    scene: Scene, extra: dict[str, Any], imposed: str | None
) -> None:
    session, http = await scene.bound()
    response = await http.post(CHAT, json={**ASK, **extra})
    assert response.status_code == 200
    expected = ",".join(extra) if imposed is None else imposed
    assert response.headers.get("x-anchorage-imposed", "") == expected
    assert session.imposed == {*filter(None, expected.split(","))}
    assert scene.sampler.settings[0]["temperature"] == session.ticket.temperature


async def test_sampling_can_be_refused_and_constraints_ignored(tmp_path: Path) -> None:
    async with gateway(agent_config(tmp_path, sampling="refuse", constraints="ignore")) as scene:
        _, http = await scene.bound()
        refused = await http.post(CHAT, json={**ASK, "temperature": 0})
        assert refused.status_code == 400
        assert refused.json()["error"] == {
            "message": "temperature is the run's (rollout.temperature=0.7): leave it out, or set agent.sampling=impose",
            "type": "invalid_request_error",
            "param": "temperature",
            "code": "sampling_fixed",
        }
        ignored = await http.post(
            CHAT, json={**ASK, "tool_choice": "required", "response_format": {"type": "json_object"}}
        )
        assert ignored.status_code == 200
        assert {*ignored.headers["x-anchorage-imposed"].split(",")} == {"tool_choice", "response_format"}


async def test_lengths_stops_and_log_probabilities_are_honoured(scene: Scene) -> None:
    _, http = await scene.bound()
    scene.sampler.told.append("one two STOP three")
    body = {**ASK, "stop": ["STOP"], "max_tokens": 1000, "logprobs": True}
    response = (await http.post(CHAT, json=body)).json()
    (choice,) = response["choices"]
    assert (choice["message"]["content"].strip(), choice["finish_reason"]) == ("one two", "stop")
    assert scene.sampler.settings[0]["max_tokens"] == 256
    assert scene.sampler.settings[0]["stop"] == ["STOP"]
    entries = choice["logprobs"]["content"]
    assert len(entries) == response["usage"]["completion_tokens"]
    assert "".join(entry["token"] for entry in entries).strip() == "one two STOP"
    scene.sampler.told.append("one two three four five six seven")
    cut = (await http.post(CHAT, json={**ASK, "max_completion_tokens": 3})).json()
    assert cut["choices"][0]["finish_reason"] == "length"
    assert cut["usage"]["completion_tokens"] == 3


async def test_an_answer_that_cannot_be_read_is_text_and_invalid(scene: Scene) -> None:
    session, http = await scene.bound()
    scene.sampler.told.append('<tool_call>\n{"name": "act", "arguments": {"action": \n</tool_call>')
    response = await http.post(CHAT, json=ASK)
    message = response.json()["choices"][0]["message"]
    assert response.status_code == 200
    assert "tool_calls" not in message
    assert "<tool_call>" in message["content"]
    (step,) = session.record.steps(cut=True)
    assert not step.valid
    assert session.counts["unreadable"] == 1


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b'{"messages": "\\ud800"}', b"[" * 100_000, b"1e999"])
async def test_bodies_that_are_no_requests_are_refused(scene: Scene, body: bytes) -> None:
    _, http = await scene.bound()
    response = await http.post(CHAT, content=body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
    assert response.headers["x-should-retry"] == "false"


async def test_the_text_of_a_refusal_says_that_a_prompt_is_too_long(scene: Scene) -> None:
    """In the words that agents look for before they summarise; `openai` puts no code into an error's text."""
    _, http = await scene.bound()
    response = await http.post(CHAT, json={**ASK, "messages": [user("word " * 3000)]})
    said = response.json()["error"]["message"]
    assert "prompt is too long" in said
    assert "maximum context length is 2000 tokens" in said


async def test_calls_of_tools_have_an_id_each_whatever_the_policy_writes(scene: Scene) -> None:
    _, http = await scene.bound()
    call = '<tool_call>\n{"name": "act", "arguments": {"action": "up"}, "id": "same"}\n</tool_call>'
    scene.sampler.told.extend([f"{call}\n{call}", call])
    ids = []
    for _ in range(2):
        message = (await http.post(CHAT, json=ASK)).json()["choices"][0]["message"]
        ids += [one["id"] for one in message["tool_calls"]]
    assert len({*ids} - {"same"}) == 3


async def test_too_long_a_body_is_refused(scene: Scene) -> None:
    _, http = await scene.bound()
    response = await http.post(CHAT, content=b" " * (8 * 2**20 + 1))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_long")
    assert response.headers["x-should-retry"] == "false"


ROUTES = [
    ("POST", CHAT),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("POST", "/v1/responses"),
    ("GET", "/episode"),
    ("POST", "/episode/step"),
    ("POST", "/episode/observe"),
    ("POST", "/episode/end"),
    ("POST", "/episode/fail"),
    ("POST", "/episodes/next"),
    ("GET", "/metrics"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_every_route_but_health_needs_a_key(scene: Scene, method: str, path: str) -> None:
    _, _ = await scene.bound()
    for headers in ({}, {"Authorization": "Bearer anc_wrong"}, {"Authorization": "Basic x"}, {"x-api-key": "wrong"}):
        async with httpx.AsyncClient(base_url=scene.url, headers=headers, trust_env=False) as http:
            response = await http.request(method, path, content=b"{}" if method == "POST" else None)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert response.headers["x-should-retry"] == "false"
            assert (await http.get("/health")).json() == {"status": "ok"}


async def test_a_key_opens_its_own_episode_until_it_is_void(scene: Scene) -> None:
    first, http = await scene.bound(0)
    second, other = await scene.bound(1, index=5)
    assert (await http.get("/episode")).json()["episode"] == first.ticket.id
    assert (await other.get("/episode")).json()["episode"] == second.ticket.id
    assert (await scene.http("x", **{"x-api-key": scene.key(first)}).get("/episode")).status_code == 401
    async with httpx.AsyncClient(
        base_url=scene.url, headers={"x-api-key": scene.key(first)}, trust_env=False
    ) as by_header:
        assert (await by_header.get("/episode")).status_code == 200
    scene.gateway.keys.void(scene.key(first), moved())
    gone = await http.post(CHAT, json=ASK)
    assert gone.status_code == 401
    assert "went to another actor" in gone.json()["error"]["message"]
    scene.gateway.keys.void(scene.key(second), episode_ended())
    ended = await other.post(CHAT, json=ASK)
    assert (ended.status_code, ended.json()["error"]["code"]) == (400, "episode_ended")
    assert len(scene.gateway.keys) == 0


async def test_unknown_routes_and_the_responses_api_are_404(scene: Scene) -> None:
    _, http = await scene.bound()
    for method, path in [("GET", "/"), ("POST", "/v1/embeddings"), ("GET", CHAT)]:
        response = await http.request(method, path)
        assert (response.status_code, response.headers["x-should-retry"]) == (404, "false")
    response = await http.post("/v1/responses", json={})
    assert response.status_code == 404
    assert 'set_default_openai_api("chat_completions")' in response.json()["error"]["message"]


async def test_more_calls_at_once_than_allowed_are_asked_to_wait(tmp_path: Path) -> None:
    async with gateway(agent_config(tmp_path, parallel_calls=2)) as scene:
        session, http = await scene.bound()
        scene.sampler.open.clear()
        running = [asyncio.create_task(http.post(CHAT, json=ASK)) for _ in range(2)]
        await _until(lambda: len(session.running) == 2)
        third = await http.post(CHAT, json=ASK)
        assert (third.status_code, third.headers["retry-after"], third.headers["x-should-retry"]) == (429, "1", "true")
        scene.sampler.open.set()
        assert [response.status_code for response in await asyncio.gather(*running)] == [200, 200]


async def test_too_many_calls_end_the_episode(tmp_path: Path) -> None:
    async with gateway(agent_config(tmp_path, max_calls=2)) as scene:
        session, http = await scene.bound()
        codes = [(await http.post(CHAT, json=ASK)).status_code for _ in range(3)]
        assert codes == [200, 200, 400]
        assert session.cause == "max_calls"
        assert [step.truncated for step in session.record.steps(cut=True)] == [False, True]


async def test_an_engine_that_fails_is_503_and_ends_the_attempt(scene: Scene) -> None:
    session, http = await scene.bound()
    scene.sampler.error = EngineFailed("the engine is broken")
    response = await http.post(CHAT, json=ASK)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_failed")
    assert session.cause == "engine"
    assert isinstance(session.error, EngineFailed)


async def test_calls_after_the_end_are_refused_for_good(scene: Scene) -> None:
    session, http = await scene.bound(index=0)
    for number in range(2):
        assert (await http.post("/episode/step", json={"action": "up"})).json()["step"] == number + 1
    assert session.cause == "done"
    for path, body in [(CHAT, ASK), ("/episode/step", {"action": "up"}), ("/episode/fail", {})]:
        response = await http.post(path, json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "episode_ended")


async def test_models_and_metrics(scene: Scene) -> None:
    _, http = await scene.bound()
    names = [model["id"] for model in (await http.get("/v1/models")).json()["data"]]
    assert names == ["policy", "policy:frozen"]
    await http.post(CHAT, json={**ASK, "temperature": 0})
    await http.post(CHAT, json={**ASK, "n": 2})
    page = (await scene.http(TOKEN).get("/metrics")).text
    assert 'anchorage_agent_calls_total{code="200"} 1.0' in page
    assert 'anchorage_agent_refused_total{code="unsupported_in_training"} 1.0' in page
    assert 'anchorage_agent_imposed_total{field="temperature"} 1.0' in page
    assert 'anchorage_agent_call_seconds_count{part="sample"} 1.0' in page


async def test_completions_take_text_and_token_ids(scene: Scene) -> None:
    session, http = await scene.bound()
    scene.sampler.told.extend([" up", " down", " up again"])
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    first = (await http.post("/v1/completions", json={"model": "policy", "prompt": text})).json()
    assert (first["object"], first["choices"][0]["text"]) == ("text_completion", " up")
    longer = text + " up<|im_end|>\n<|im_start|>user\nAgain"
    await http.post("/v1/completions", json={"prompt": longer})
    ids = scene.sampler.prompts[1] + scene.sampler.answers[1][:-1] + [5, 6]
    await http.post("/v1/completions", json={"prompt": ids})
    assert [call.prompt.extends for call in session.record.calls] == [-1, 0, 1]
    before = scene.sampler.prompts[0] + scene.sampler.answers[0][:-1]
    assert scene.sampler.prompts[1][: len(before)] == before
    assert scene.sampler.prompts[2] == ids
    wrong = await http.post("/v1/completions", json={"prompt": [10**7]})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "prompt")
    several = await http.post("/v1/completions", json={"prompt": ["a", "b"]})
    assert several.status_code == 400


async def _until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - any condition at all
            await asyncio.sleep(0.005)


async def test_several_tools_at_once_are_called_unless_the_request_wants_one(scene: Scene) -> None:
    _, http = await scene.bound()
    scene.sampler.told.append(act("down") + "\n" + act("up"))
    both = await http.post(CHAT, json=ASK)
    assert arguments_of(both) == [{"action": "down"}, {"action": "up"}]
    scene.sampler.told.append(act("down") + "\n" + act("up"))
    first = await http.post(CHAT, json={**ASK, "parallel_tool_calls": False})
    assert arguments_of(first) == [{"action": "down"}]
