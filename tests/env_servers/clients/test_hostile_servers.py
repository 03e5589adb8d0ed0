"""Servers that misbehave at one action: each gives one clear line or fails that episode alone, and nothing hangs.

A server plays honestly until an action names one of its misdeeds.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from env_servers.client import HttpClient, OpenEnvClient, RequestRejected, SessionLost
from env_servers.clients import bodies, openenv_socket
from env_servers.clients.interface import EnvironmentUnavailableError, WrongAnswer
from env_servers.conformance.__main__ import main
from env_servers.protocol import ResetRequest

TASK = ResetRequest(split="train", index=0)
LIMIT = 1 << 20
SILENT_S = 3.0
"""How long an answer is waited for: an honest one comes in time on a busy machine too."""
ONE_LINE = re.compile(r"[^\n\r\x1b]{1,400}")


def result(session: str, step: int, **other: Any) -> dict[str, Any]:
    return {
        "session": session, "step": step, "observation": "o", "reward": 0.5 if step else 0.0, "terminated": False,
        "truncated": False, "anchor": "o", **other,
    }  # fmt: skip


def problem(status: int, detail: str) -> web.Response:
    body = json.dumps({"title": "x", "status": status, "detail": detail})
    return web.Response(status=status, text=body, content_type="application/problem+json")


def misdeed(action: str, good: dict[str, Any]) -> web.Response:
    """The answer to an action that names a misdeed; the honest one for others."""
    whole = json.dumps(good)
    match action:
        case "500":
            return problem(500, "Traceback\n  File \x1b[31mx\n" + "y" * 10_000)
        case "plain 500":
            return web.Response(status=500, text="<html>\nInternal Server Error")
        case "not JSON":
            return web.Response(text="<html><body>Welcome</body></html>", content_type="text/html")
        case "empty":
            return web.Response(status=204)
        case "UTF-8":
            return web.Response(body=whole.encode().replace(b'"o"', b'"\xff\xfe"'), content_type="application/json")
        case "redirect":
            return web.Response(status=302, headers={"Location": "/elsewhere"})
        case "other session":
            return web.json_response({**good, "session": "another"})
        case "other step":
            return web.json_response({**good, "step": good["step"] + 1})
        case "huge":
            return web.Response(
                text=whole.replace('"o"', json.dumps("x" * (LIMIT + 1))), content_type="application/json"
            )
        case "bomb":
            body = gzip.compress(whole.encode() + b" " * (200 * LIMIT))
            return web.Response(body=body, headers={"Content-Encoding": "gzip", "Content-Type": "application/json"})
        case "bad gzip":
            return web.Response(body=b"no gzip", headers={"Content-Encoding": "gzip"})
        case _ if action.startswith("{"):
            return web.json_response({**good, **json.loads(action)})
        case _:
            return web.Response(text=whole, content_type="text/plain")


class Hostile:
    """Speaks the step API; sessions are named by their number."""

    def __init__(self, batching: bool) -> None:
        self.batching = batching
        self.sessions = 0
        self.over = asyncio.Event()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=LIMIT)
        app.router.add_get("/info", self.info)
        app.router.add_post("/reset", self.reset)
        app.router.add_post("/step", self.step)
        app.router.add_post("/batch/step", self.batch)
        app.router.add_post("/close", self.close)
        return app

    async def info(self, _: web.Request) -> web.Response:
        return web.json_response(
            {
                "name": "hostile", "version": "1", "splits": {"train": 2}, "max_sessions": 64, "idle_seconds": 60.0,
                "batching": self.batching,
            }
        )  # fmt: skip

    async def reset(self, _: web.Request) -> web.Response:
        self.sessions += 1
        return web.json_response(result(str(self.sessions), 0))

    async def step(self, request: web.Request) -> web.Response:
        asked = await request.json()
        if asked["action"] == "hang":
            await self.over.wait()
        return misdeed(asked["action"], result(asked["session"], asked["step"]))

    async def batch(self, request: web.Request) -> web.Response:
        """Whatever is wrong with one step is wrong with the whole answer."""
        items = []
        for asked in (await request.json())["items"]:
            if asked["action"] == "hang":
                await self.over.wait()
            answer = misdeed(asked["action"], result(asked["session"], asked["step"]))
            try:
                assert answer.status == 200
                assert isinstance(answer.body, bytes)
                items.append(json.loads(answer.body))
            except (AssertionError, ValueError):
                return answer
        return web.json_response({"items": items})

    async def close(self, _: web.Request) -> web.Response:
        return web.Response(status=500, text="no")


@pytest.fixture
def _small_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_ANSWER_BYTES", LIMIT)
    monkeypatch.setattr(openenv_socket, "MAX_ANSWER_BYTES", LIMIT)


@pytest.fixture(params=[False, True], ids=["alone", "batched"])
async def hostile(request: pytest.FixtureRequest, _small_answers: None) -> AsyncIterator[str]:
    server = Hostile(request.param)
    async with TestServer(server.app()) as running:
        yield f"http://127.0.0.1:{running.port}"
        server.over.set()


REJECTED = [
    ("500", "Traceback File"),
    ("plain 500", "<html> Internal Server Error"),
    ("not JSON", "does not speak the step API: Invalid JSON"),
    ("empty", "does not speak the step API: Invalid JSON"),
    ("UTF-8", "does not speak the step API: Invalid JSON"),
    ("other session", "returned the state of another session for step 1"),
    ("other step", "returned step 2 for step 1"),
    ("huge", "the answer is longer than 1 MiB"),
    ("bomb", "the answer is longer than 1 MiB"),
    ('{"reward": "1.5"}', 'reward is "1.5", not a finite number'),
    ('{"reward": true}', "reward is True, not a finite number"),
    ('{"reward": null}', "reward is None, not a finite number"),
    ('{"reward": NaN}', "reward is nan, not a finite number"),
    ('{"reward": 1e400}', "reward is inf, not a finite number"),
    ('{"facts": {"won": "no"}}', 'facts.won is "no", not true or false'),
    ('{"terminated": "no"}', "terminated: Input should be a valid boolean"),
    ('{"truncated": 1}', "truncated: Input should be a valid boolean"),
    ('{"observation": ["o"]}', "observation: Input should be a valid string"),
    ('{"session": 5}', "session: Input should be a valid string"),
]


@pytest.mark.parametrize(("action", "told"), REJECTED)
async def test_one_bad_answer_fails_its_own_episode_with_one_line(hostile: str, action: str, told: str) -> None:
    client = HttpClient(hostile, patience_s=1.0)
    mine, *others = [await client.reset(TASK) for _ in range(4)]
    failed, *taken = await asyncio.gather(
        client.step(mine.session, 1, action),
        *(client.step(other.session, 1, "go") for other in others),
        return_exceptions=True,
    )
    assert isinstance(failed, RequestRejected), failed
    assert told in str(failed)
    assert ONE_LINE.fullmatch(str(failed))
    for other, state in zip(others, taken, strict=True):
        assert not isinstance(state, BaseException), state
        assert (state.session, state.step, state.reward) == (other.session, 1, 0.5)
    await client.close_session(mine.session)
    await client.close()


@pytest.mark.parametrize(
    ("action", "told"),
    [("hang", "no answer within 3 s"), ("redirect", "status 302"), ("bad gzip", "is unavailable")],
)
async def test_an_answer_that_never_comes_costs_its_own_episode_a_bounded_time(
    hostile: str, action: str, told: str
) -> None:
    client = HttpClient(hostile, timeout_s=SILENT_S, patience_s=0.5)
    mine, *others = [await client.reset(TASK) for _ in range(3)]
    async with asyncio.timeout(60):
        failed, *taken = await asyncio.gather(
            client.step(mine.session, 1, action),
            *(client.step(other.session, 1, "go") for other in others),
            return_exceptions=True,
        )
    assert isinstance(failed, EnvironmentUnavailableError), failed
    assert told in str(failed)
    assert ONE_LINE.fullmatch(str(failed))
    assert [state.reward for state in taken if not isinstance(state, BaseException)] == [0.5, 0.5]
    await client.close()


async def test_wrong_answers_are_told_apart(hostile: str) -> None:
    client = HttpClient(hostile)
    state = await client.reset(TASK)
    with pytest.raises(WrongAnswer):
        await client.step(state.session, 1, "other session")
    assert (await client.step(state.session, 1, "go")).reward == 0.5
    await client.close()


async def test_the_check_ends_in_lines(hostile: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["500", "not JSON", "UTF-8", "other session", "huge", '{"reward": NaN}', "redirect"]
    actions = [part for name in names for part in ("--action", name)]
    quick = ["--tasks", "2", "--steps", "4", "--seconds", "0.05", *actions]
    assert await asyncio.to_thread(main, [hostile, *quick]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert "NOT fit for training: deterministic" in out
    assert "Traceback (most" not in out
    assert "\x1b" not in out


@pytest.mark.parametrize("splits", [{"train": -1}, {"train": 10**30}])
async def test_impossible_numbers_of_tasks_are_no_environment(
    splits: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    async def info(_: web.Request) -> web.Response:
        facts = {"name": "x\x1b[2J", "version": "1", "splits": splits, "max_sessions": 1, "idle_seconds": 1}
        return web.json_response(facts)

    app = web.Application()
    app.router.add_get("/info", info)
    async with TestServer(app) as running:
        assert await asyncio.to_thread(main, [f"http://127.0.0.1:{running.port}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "splits.train is not a number of tasks" in line


TEXT_ACTION = {"properties": {"m": {"type": "string"}}}


class HostileOpenEnv:
    """Speaks OpenEnv; a step's action is the message to send back, or the name of a misdeed."""

    def __init__(self) -> None:
        self.schema: Any = {"action": TEXT_ACTION}
        self.tools: Any = []
        self.over = asyncio.Event()

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/metadata", self.describe)
        app.router.add_get("/schema", self.show_schema)
        app.router.add_get("/ws", self.play)
        return app

    async def describe(self, _: web.Request) -> web.Response:
        return web.json_response({"name": "hostile"})

    async def show_schema(self, _: web.Request) -> web.Response:
        return web.json_response(self.schema)

    async def play(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            asked = json.loads(message.data)
            if asked["data"].get("type") == "list_tools":
                await socket.send_json({"type": "observation", "data": {"observation": {"tools": self.tools}}})
                continue
            action = asked["data"].get("m", "")
            good = {"type": "observation", "data": {"observation": {"text": "o"}, "reward": 0.5, "done": False}}
            match action:
                case "hang":
                    await self.over.wait()
                case "twice":
                    await socket.send_json(good)
                    await socket.send_json({"type": "observation", "data": {"observation": {"text": "?"}, "reward": 9}})
                case "huge":
                    await socket.send_str("x" * (LIMIT + 1))
                case "UTF-8":
                    await socket.send_bytes(b'{"type": "observation", "data": {"observation": "\xff"}}')
                case "not JSON":
                    await socket.send_str("<html>")
                case "list":
                    await socket.send_str("[]")
                case _ if action.startswith("{"):
                    good["data"] = {**good["data"], **json.loads(action)}  # type: ignore[dict-item]
                    await socket.send_json(good)
                case _:
                    await socket.send_json(good)
        return socket


@pytest.fixture
async def openenv(_small_answers: None) -> AsyncIterator[tuple[HostileOpenEnv, str]]:
    server = HostileOpenEnv()
    async with TestServer(server.app()) as running:
        yield server, f"http://127.0.0.1:{running.port}"
        server.over.set()


@pytest.mark.parametrize(
    ("action", "error", "told"),
    [
        ("hang", SessionLost, "no answer within 3 s"),
        ("huge", SessionLost, "invalid WebSocket message"),
        ("UTF-8", SessionLost, "invalid JSON"),
        ("not JSON", SessionLost, "invalid JSON"),
        ("list", SessionLost, "an answer without data"),
        ('{"reward": "1.5"}', RequestRejected, 'reward is "1.5", not a finite number'),
        ('{"done": "no"}', RequestRejected, 'done is "no", not true or false'),
        ('{"done": 1}', RequestRejected, "done is 1, not true or false"),
        ('{"observation": [1]}', RequestRejected, "observation is not an object"),
        ('{"observation": {"text": "o", "won": "no"}}', RequestRejected, 'facts.won is "no", not true or false'),
    ],
)
async def test_a_bad_message_of_an_openenv_server(
    openenv: tuple[HostileOpenEnv, str], action: str, error: type[Exception], told: str
) -> None:
    client = OpenEnvClient(openenv[1], timeout_s=SILENT_S)
    mine, other = [await client.reset(TASK) for _ in range(2)]
    with pytest.raises(error) as caught:
        await client.step(mine.session, 1, action)
    assert told in str(caught.value)
    assert ONE_LINE.fullmatch(str(caught.value))
    assert (await client.step(other.session, 1, "go")).reward == 0.5
    await client.close()


async def test_a_message_that_nothing_was_sent_for_is_no_answer_to_the_next_step(
    openenv: tuple[HostileOpenEnv, str],
) -> None:
    client = OpenEnvClient(openenv[1])
    state = await client.reset(TASK)
    assert (await client.step(state.session, 1, "twice")).reward == 0.5
    await asyncio.sleep(0.2)
    with pytest.raises(SessionLost, match="unexpected message"):
        await client.step(state.session, 2, "go")
    await client.close()


@pytest.mark.parametrize(
    "action",
    [
        {"properties": {"m": True}, "required": 5},
        {"properties": {"a": {"type": "integer", "minimum": "x"}}, "required": ["a"]},
        {"properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"properties": {"a": {"type": "string", "minLength": 10**12}}, "required": ["a", "b"]},
        {"properties": [1]},
        5,
    ],
)
async def test_schemas_that_are_none(openenv: tuple[HostileOpenEnv, str], action: Any) -> None:
    server, url = openenv
    server.schema = {"action": action}
    client = OpenEnvClient(url)
    state, reason = await client.reset(TASK), "the schema can be read"
    try:
        for example in await client.example_actions(3):
            await client.step(state.session, 1, example)
    except RequestRejected as error:
        reason = str(error)
    assert ONE_LINE.fullmatch(reason)
    await client.close()


async def test_tools_without_a_description(openenv: tuple[HostileOpenEnv, str]) -> None:
    server, url = openenv
    server.schema = {"action": {"properties": {"tool_name": {}, "arguments": {}}}}
    server.tools = [{"name": "say", "description": None, "input_schema": {"properties": {"a": True}}}]
    client = OpenEnvClient(url)
    assert "say[JSON object]" in (await client.reset(TASK)).observation
    server.tools = [{"name": 5}]
    with pytest.raises(EnvironmentUnavailableError, match="does not list its tools"):
        await client.reset(TASK)
    await client.close()
