"""Retries, disconnects and streams, with raw sockets, httpx and the `openai` client over the same gateway."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.gateway import app
from actors.gateway.errors import Refused
from actors.gateway.service import Offer, Offers
from tests.actors.gateway.scene import ACT, TOKEN, Scene, act, agent_config, gateway, user

openai = pytest.importorskip("openai", reason="openai is missing: make setup")

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "policy", "messages": [user("The count is 0.")], "tools": [ACT]}
RETRY = {"x-stainless-retry-count": "1"}


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110 - any condition at all
            await asyncio.sleep(0.005)


async def leave(scene: Scene, key: str, body: dict[str, Any], started: Callable[[], Any]) -> None:
    """Ask, and close the connection as soon as the call has started."""
    text = json.dumps(body).encode()
    host, _, port = scene.url.removeprefix("http://").rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: {len(text)}\r\n\r\n"
    writer.write(head.encode() + text)
    await until(started)
    writer.close()


async def test_a_marked_retry_joins_the_call_and_gets_the_same_bytes(scene: Scene) -> None:
    session, http = await scene.bound()
    scene.sampler.open.clear()
    first = asyncio.create_task(http.post(CHAT, json=ASK))
    await until(lambda: session.running)
    joined = asyncio.create_task(http.post(CHAT, json=ASK, headers=RETRY))
    await until(lambda: _retries(scene, "joined"))
    scene.sampler.open.set()
    answers = [await first, await joined, await http.post(CHAT, json=ASK, headers=RETRY)]
    assert len({answer.content for answer in answers}) == 1
    assert (len(scene.sampler.prompts), _retries(scene, "joined"), _retries(scene, "replayed")) == (1, 1, 1)


async def test_an_unmarked_repeat_is_a_new_sample_and_a_retry_gets_the_newest(scene: Scene) -> None:
    session, http = await scene.bound()
    scene.sampler.told.extend([act("up"), act("down")])
    first = (await http.post(CHAT, json=ASK)).content
    second = (await http.post(CHAT, json=ASK)).content
    assert first != second
    assert (await http.post(CHAT, json=ASK, headers=RETRY)).content == second
    seeds = [settings["seed"] for settings in scene.sampler.settings]
    assert len({*seeds}) == len(session.record.steps()) == 2


async def test_an_idempotency_key_names_a_call(scene: Scene) -> None:
    _, http = await scene.bound()
    answers = [
        (await http.post(CHAT, json=body, headers={"Idempotency-Key": key})).json()["id"]
        for body, key in [(ASK, "a"), (ASK, "b"), (ASK, "a"), ({**ASK, "max_tokens": 60}, "a")]
    ]
    assert answers == ["train-17-0-0", "train-17-0-1", "train-17-0-0", "train-17-0-2"]


async def test_a_client_that_left_is_waited_for_and_its_call_is_no_step(scene: Scene) -> None:
    session, http = await scene.bound()
    scene.sampler.open.clear()
    await leave(scene, scene.key(session), ASK, lambda: session.running)
    await until(lambda: _abandoned(scene, session))
    scene.sampler.open.set()
    await until(lambda: not session.running)
    assert (session.orphaned, session.record.steps()) == (1, ())
    await http.post(CHAT, json={**ASK, "messages": [user("another")]})
    assert len(session.record.steps()) == 1


async def test_a_later_prompt_that_holds_an_answer_proves_its_delivery(scene: Scene) -> None:
    session, http = await scene.bound()
    answer = (await http.post(CHAT, json=ASK)).json()["choices"][0]["message"]
    session.record.calls[0].delivered = False  # as if the connection had broken behind the last byte
    result = {"role": "tool", "tool_call_id": answer["tool_calls"][0]["id"], "content": "The count is 1."}
    await http.post(CHAT, json={**ASK, "messages": [*ASK["messages"], answer, result]})
    assert [step.extends for step in session.record.steps()] == [-1, 0]


async def test_an_unmarked_repeat_takes_up_a_call_whose_client_has_left(scene: Scene) -> None:
    session, http = await scene.bound()
    scene.sampler.open.clear()
    body = json.dumps(ASK).encode()
    await leave(scene, scene.key(session), ASK, lambda: session.running)
    await until(lambda: _abandoned(scene, session))
    again = asyncio.create_task(http.post(CHAT, content=body))
    await until(lambda: _retries(scene, "joined"))
    scene.sampler.open.set()
    assert (await again).status_code == 200
    assert (len(scene.sampler.prompts), len(session.record.steps())) == (1, 1)


async def test_a_call_abandoned_for_good_is_dropped_from_the_engine(tmp_path: Path) -> None:
    async with gateway(agent_config(tmp_path, linger_s=0.0)) as scene:
        session, http = await scene.bound()
        scene.sampler.open.clear()
        await leave(scene, scene.key(session), ASK, lambda: session.running)
        await until(lambda: scene.sampler.dropped)
        scene.sampler.open.set()
        fresh = await http.post(CHAT, json=ASK, headers=RETRY)
        assert fresh.status_code == 200
        assert [call.delivered for call in session.record.calls] == [False, True]


async def test_a_client_with_a_short_patience_gets_every_answer_once(scene: Scene) -> None:
    """`openai` times out again and again; the calls continue, and its retries join them."""
    session, _ = await scene.bound()
    session.agent = session.agent.model_copy(update={"linger_s": 600.0})
    client = openai.AsyncOpenAI(base_url=f"{scene.url}/v1", api_key=scene.key(session), timeout=0.3, max_retries=1000)
    scene.sampler.open.clear()
    count = 12
    asked = [
        asyncio.create_task(client.chat.completions.create(model="policy", messages=[user(f"call {number}")]))
        for number in range(count)
    ]
    await until(lambda: _retries(scene, "joined") >= count)
    scene.sampler.open.set()
    answers = await asyncio.gather(*asked)
    assert len({answer.id for answer in answers}) == count
    assert len(scene.sampler.prompts) == len(session.record.steps()) == count
    await client.close()


@pytest.mark.parametrize("extra", [{"n": 4}, {"tool_choice": "required"}, {"max_tokens": 0}, {"messages": []}])
async def test_openai_makes_one_request_for_a_final_refusal(scene: Scene, extra: dict[str, Any]) -> None:
    session, _ = await scene.bound()
    client = openai.AsyncOpenAI(base_url=f"{scene.url}/v1", api_key=scene.key(session))
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(**{**ASK, **extra})
    assert refused.value.body["message"]
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="anc_other").chat.completions.create(**ASK)
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(model="policy", input="hello")
    page = (await scene.http(TOKEN).get("/metrics")).text
    counts = [float(line.split()[-1]) for line in page.splitlines() if line.startswith("anchorage_agent_refused_total")]
    assert sum(counts) == 3
    await client.close()


def odd_answers(count: int) -> list[str]:
    """Texts, calls, malformed calls, characters of several bytes."""
    rng = random.Random(7)
    words = ["go", "é", "漢字", "😀", "\n", "  ", '"', "\\", "<b>", "{", "}"]
    made = []
    for _ in range(count):
        text = " ".join(rng.choices(words, k=rng.randrange(1, 12)))
        kind = rng.randrange(4)
        made.append([text, act(text), text + "\n" + act("up") + "\n" + act(text), act(text)[:-9]][kind])
    return made


async def test_a_stream_adds_up_to_the_plain_answer(scene: Scene) -> None:
    session, _ = await scene.bound()
    session.agent = session.agent.model_copy(update={"max_calls": 10_000})
    client = openai.AsyncOpenAI(base_url=f"{scene.url}/v1", api_key=scene.key(session))
    for text in odd_answers(60):
        scene.sampler.told.extend([text, text])
        plain = await client.chat.completions.create(**ASK)
        async with client.chat.completions.stream(**ASK, stream_options={"include_usage": True}) as stream:
            events = [event async for event in stream]
            streamed = await stream.get_final_completion()
        assert events
        left, right = plain.choices[0], streamed.choices[0]
        assert left.finish_reason == right.finish_reason
        assert (left.message.content or None) == (right.message.content or None)
        calls = [
            [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
            for choice in (left, right)
        ]
        assert calls[0] == calls[1]
        assert plain.usage is not None
        assert streamed.usage is not None
        assert plain.usage.completion_tokens == streamed.usage.completion_tokens
    assert len(session.record.steps()) == 120
    await client.close()


async def test_a_stream_begins_at_once_and_is_kept_alive(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "COMMENT_S", 0.05)
    session, http = await scene.bound()
    scene.sampler.open.clear()
    seen = b""
    async with http.stream("POST", CHAT, json={**ASK, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        async for part in response.aiter_bytes():
            seen += part
            if seen.count(b": sampling") >= 3:
                scene.sampler.open.set()
    first, *_ = seen.split(b"\n\n")
    assert json.loads(first.removeprefix(b"data: "))["choices"][0]["delta"]["role"] == "assistant"
    assert seen.endswith(b"data: [DONE]\n\n")
    assert len(session.record.steps()) == 1


async def test_a_stream_that_is_left_is_not_delivered(scene: Scene) -> None:
    session, _ = await scene.bound()
    scene.sampler.open.clear()
    await leave(scene, scene.key(session), {**ASK, "stream": True}, lambda: session.running)
    await until(lambda: _abandoned(scene, session))
    scene.sampler.open.set()
    await until(lambda: not session.running)
    assert session.record.steps() == ()


async def test_a_stream_is_refused_with_a_status_before_it_begins(scene: Scene) -> None:
    _, http = await scene.bound()
    response = await http.post(CHAT, json={**ASK, "stream": True, "n": 2})
    assert (response.status_code, response.headers["content-type"]) == (400, "application/json")


async def test_an_error_within_a_stream_reaches_the_client(scene: Scene) -> None:
    session, _ = await scene.bound()
    scene.sampler.error = ValueError("vLLM refuses the request")
    client = openai.AsyncOpenAI(base_url=f"{scene.url}/v1", api_key=scene.key(session))
    with pytest.raises(openai.APIError, match="vLLM refuses the request"):
        async for _ in await client.chat.completions.create(**ASK, stream=True):
            pass
    await client.close()


async def test_services_and_offers_wait_for_each_other(scene: Scene) -> None:
    services = scene.http(TOKEN)
    assert (await services.post("/episodes/next", json={"wait_s": 0})).status_code == 204
    waiting = [asyncio.create_task(services.post("/episodes/next", json={"wait_s": 30})) for _ in range(2)]
    await until(lambda: scene.gateway.offers.waiting == 2)
    offers = [Offer({"episode": f"train/0/{number}"}) for number in range(3)]
    for offer in offers:
        scene.gateway.offers.offer(offer)
    assert {(await task).json()["episode"] for task in waiting} == {"train/0/0", "train/0/1"}
    scene.gateway.offers.withdraw(offers[2])
    assert (await services.post("/episodes/next", json={"wait_s": 0})).status_code == 204
    assert [offer.taken.is_set() for offer in offers] == [True, True, False]
    assert (await services.post("/episodes/next", json={"wait_s": 31})).status_code == 400


async def test_an_offer_whose_service_left_is_made_again() -> None:
    offers, gone = Offers(), asyncio.Event()
    leaving = asyncio.create_task(offers.next(30, gone))
    await until(lambda: offers.waiting == 1)
    offer = Offer({})
    gone.set()
    offers.offer(offer)
    assert await leaving is None
    assert await offers.next(0, asyncio.Event()) is offer


def test_a_refusal_says_whether_to_try_again() -> None:
    assert Refused(429, "x", "y", retry_after_s=7).headers == {"x-should-retry": "true", "Retry-After": "7"}
    assert Refused(400, "x", "y").headers == {"x-should-retry": "false"}


def _retries(scene: Scene, kind: str) -> float:
    return scene.gateway.calls.policy.metrics.retries.labels(kind)._value.get()


def _abandoned(scene: Scene, session: Any) -> bool:
    return any(pending.abandoned for pending in scene.gateway.calls._sessions[session].all)
