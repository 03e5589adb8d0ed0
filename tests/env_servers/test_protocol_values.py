"""Servers that return invalid numbers, over each protocol: the episode fails, and the line names server and value."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from env_servers.client import EnvironmentClient, HttpClient, OpenEnvClient, RequestRejected
from env_servers.clients.local import LocalClient
from env_servers.environment import Observation
from env_servers.protocol import Problem, ResetRequest, StepRequest, StepResult, invalid_value
from tests.env_servers.counting import Counting

TASK = ResetRequest(split="train", index=0)
NOT_NUMBERS = ["NaN", "Infinity", "-Infinity", "1e400", "1" + "0" * 400, "9" * 5000, '"ten"', "[]", "{}"]
NOT_BOOLEANS = ['"no"', "0", "1", "NaN", "[]", '""']
BAD = [(value, "{}") for value in NOT_NUMBERS] + [("1.0", f'{{"won": {value}}}') for value in NOT_BOOLEANS]
BAD += [("1.0", f'{{"score": {value}}}') for value in NOT_NUMBERS[:6]]
BAD += [("1.0", f'{{"parts": {{"price": [0.5, {value}]}}}}') for value in NOT_NUMBERS[:4]]
GOOD = [("1.5", "{}"), ("-3", '{"won": true}'), ("1e300", '{"won": null, "score": 0.5}'), ("0", '{"won": false}')]


class Foreign:
    """A server that speaks the step API and OpenEnv by hand; `reward` and `facts` are the JSON that a step gives."""

    def __init__(self) -> None:
        self.reward, self.facts = "1.0", "{}"

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/info", self.info)
        app.router.add_post("/reset", self.reset)
        app.router.add_post("/step", self.step)
        app.router.add_post("/batch/step", self.batch)
        app.router.add_post("/close", self.step)
        app.router.add_get("/schema", self.schema)
        app.router.add_get("/ws", self.openenv)
        return app

    async def json(self, text: str) -> web.Response:
        return web.Response(text=text, content_type="application/json")

    async def info(self, request: web.Request) -> web.Response:
        facts = {"name": "x", "version": "1", "splits": {"train": 1}, "max_sessions": 1, "idle_seconds": 1}
        return await self.json(json.dumps(facts))

    async def schema(self, request: web.Request) -> web.Response:
        return await self.json('{"action": {"properties": {"m": {"type": "string"}}}}')

    async def reset(self, request: web.Request) -> web.Response:
        return await self.json(self.result(0, "0.0", "{}"))

    async def step(self, request: web.Request) -> web.Response:
        return await self.json(self.result(1, self.reward, self.facts))

    def result(self, step: int, reward: str, facts: str) -> str:
        ended = str(step > 0).lower()
        return (
            f'{{"session": "s", "step": {step}, "observation": "o", "reward": {reward}, "terminated": {ended}, '
            f'"truncated": false, "anchor": "o", "facts": {facts}}}'
        )

    async def batch(self, request: web.Request) -> web.Response:
        """The first step's answer is right, every other's is `reward` and `facts`."""
        count = len((await request.json())["items"])
        items = [self.result(1, "1.0", "{}"), *[self.result(1, self.reward, self.facts)] * (count - 1)]
        return await self.json(f'{{"items": [{", ".join(items)}]}}')

    async def openenv(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            stepped = json.loads(message.data)["type"] == "step"
            reward, facts = (self.reward, self.facts) if stepped else ("0.0", "{}")
            seen = f'{{"text": "o", "facts": {facts}}}'
            done = str(stepped).lower()
            await socket.send_str(
                f'{{"type": "observation", "data": {{"observation": {seen}, "reward": {reward}, "done": {done}}}}}'
            )
        return socket


@pytest.fixture
async def foreign() -> AsyncIterator[tuple[Foreign, str]]:
    server = Foreign()
    async with TestServer(server.app()) as running:
        yield server, f"http://127.0.0.1:{running.port}"


def client_of(protocol: str, url: str) -> EnvironmentClient:
    return HttpClient(url, coalesce=False) if protocol == "http" else OpenEnvClient(url)


@pytest.mark.parametrize("protocol", ["http", "openenv"])
@pytest.mark.parametrize(("reward", "facts"), BAD)
async def test_a_wrong_value_is_refused_by_name(foreign: Any, protocol: str, reward: str, facts: str) -> None:
    server, url = foreign
    server.reward, server.facts = reward, facts
    client = client_of(protocol, url)
    state = await client.reset(TASK)
    with pytest.raises(RequestRejected) as refused:
        await client.step(state.session, 1, "go")
    line = str(refused.value)
    assert url in line
    assert "invalid value" in line
    assert ("reward" if facts == "{}" else "facts.") in line
    assert "\n" not in line
    assert len(line) < 300
    await client.close()


@pytest.mark.parametrize("protocol", ["http", "openenv"])
@pytest.mark.parametrize(("reward", "facts"), GOOD)
async def test_what_is_right_passes(foreign: Any, protocol: str, reward: str, facts: str) -> None:
    server, url = foreign
    server.reward, server.facts = reward, facts
    client = client_of(protocol, url)
    state = await client.reset(TASK)
    after = await client.step(state.session, 1, "go")
    assert after.reward == float(reward)
    assert after.facts.get("won") == json.loads(facts).get("won")
    await client.close()


RESULT = {
    "session": "s", "step": 1, "observation": "o", "reward": 1.0, "terminated": True, "truncated": False, "anchor": "o"
}  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (RESULT | {"step": 0}, "returned step 0 for step 1"),
        (RESULT | {"step": 7}, "returned step 7 for step 1"),
        (RESULT | {"session": "other"}, "the state of another session"),
        ({name: value for name, value in RESULT.items() if name != "reward"}, "reward: Field required"),
        ({name: value for name, value in RESULT.items() if name != "anchor"}, "anchor: Field required"),
        (RESULT | {"observation": None}, "observation: "),
        ([], "invalid value"),
    ],
)
@pytest.mark.parametrize("coalesce", [False, True])
async def test_an_answer_that_is_none_to_the_step_fails_the_episode(
    foreign: Any, monkeypatch: pytest.MonkeyPatch, answer: object, told: str, coalesce: bool
) -> None:
    server, url = foreign
    client = HttpClient(url, coalesce=coalesce)
    state = await client.reset(TASK)
    monkeypatch.setattr(server, "result", lambda *_: json.dumps(answer))
    with pytest.raises(RequestRejected) as refused:
        await client.step(state.session, 1, "go")
    assert told in str(refused.value)
    assert len(str(refused.value)) < 300
    await client.close()


@pytest.mark.parametrize("protocol", ["http", "openenv"])
async def test_half_a_surrogate_pair_in_a_fact_can_be_read(foreign: Any, protocol: str) -> None:
    server, url = foreign
    server.facts = r'{"said": "a\ud800b"}'
    client = client_of(protocol, url)
    state = await client.reset(TASK)
    assert (await client.step(state.session, 1, "go")).facts["said"] == "a\ufffdb"
    await client.close()


@pytest.mark.parametrize("reward", ["NaN", "1e400", '"ten"', "null"])
async def test_one_wrong_value_fails_its_own_step_of_a_batch(foreign: Any, reward: str) -> None:
    server, url = foreign
    server.reward = reward
    client = HttpClient(url, coalesce=False)
    right, wrong = await client.step_many([StepRequest(session="s", step=1, action="go")] * 2)
    assert isinstance(right, StepResult)
    assert isinstance(wrong, Problem)
    assert "reward" in wrong.detail
    await client.close()


class Broken(Counting):
    """Counts, and tells a score that is none."""

    def step(self, action: str) -> Observation:
        seen = super().step(action)
        return Observation(text=seen.text, terminated=True, facts={"won": True, "parts": [math.nan]}, state=seen.state)


async def test_an_environment_of_this_process_is_held_to_the_same() -> None:
    client = LocalClient(Broken)
    state = await client.reset(TASK)
    with pytest.raises(RequestRejected, match=r"invalid value: facts.parts.0 is nan, .* \(at step 1\)"):
        await client.step(state.session, 1, "up")
    await client.close()


def test_fault_says_where_and_what() -> None:
    assert invalid_value(0.0, {"won": "no"}) == 'facts.won is "no", not true or false'
    assert invalid_value(math.nan, {}) == "reward is nan, not a finite number"
    assert invalid_value(1, {"won": None, "a": {"b": [1, 2.0, True, "x"]}}) is None
    nested: dict[str, Any] = {}
    for _ in range(10_000):
        nested = {"in": nested}
    assert invalid_value(0.0, nested) is None
