"""`/ws`: its errors, its limits, and that a session ends with its socket. Played with a bare WebSocket client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest

from env_servers.launch import ServerProcess

COUNTING = "tests.env_servers.counting:Counting"


@pytest.fixture(scope="module")
def server(serve: Callable[..., ServerProcess]) -> ServerProcess:
    return serve(COUNTING, "--max-sessions", "3", "--max-body-bytes", "8192")


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


class Talk:
    """A socket to the server under test."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket

    async def ask(self, message: Any) -> tuple[str, dict[str, Any]]:
        await self.socket.send_str(message if isinstance(message, str) else json.dumps(message))
        answer = await self.socket.receive_json(timeout=30)
        return answer["type"], answer["data"]

    async def reset(self, **data: Any) -> dict[str, Any]:
        kind, answer = await self.ask({"type": "reset", "data": data})
        assert kind == "observation", answer
        return answer

    async def step(self, action: str) -> tuple[str, dict[str, Any]]:
        return await self.ask({"type": "step", "data": {"action": action}})


@pytest.fixture
async def talk(server: ServerProcess, http: aiohttp.ClientSession) -> AsyncIterator[Talk]:
    async with http.ws_connect(f"{server.url}/ws") as socket:
        yield Talk(socket)


async def live(http: aiohttp.ClientSession, server: ServerProcess) -> int:
    async with http.get(f"{server.url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return int(float(next(line for line in lines if line.startswith("anchorage_env_sessions ")).split()[1]))


async def test_an_episode(talk: Talk) -> None:
    first = await talk.reset(index=0, episode_id="mine", anchor="state", expert=True)
    assert (first["reward"], first["done"]) == (0.0, False)
    observation = first["observation"]
    assert (observation["anchor"], observation["expert_action"], observation["task"]) == ("0/2", "up", "train/0")
    await talk.step("up")
    _, last = await talk.step("up")
    assert (last["reward"], last["done"], last["observation"]["terminated"]) == (1.0, True, True)
    assert (last["observation"]["truncated"], last["observation"]["won"]) == (False, True)
    assert await talk.ask({"type": "state"}) == (
        "state",
        {"episode_id": "mine", "step_count": 2, "split": "train", "index": 0},
    )
    assert (await talk.reset(index=0))["observation"]["step"] == 0


async def test_seeds_pick_tasks(talk: Talk) -> None:
    assert (await talk.reset(seed=103))["observation"]["index"] == 3
    assert (await talk.reset(seed=103, index=4))["observation"]["index"] == 4
    assert 0 <= (await talk.reset())["observation"]["index"] < 50


@pytest.mark.parametrize(
    ("message", "code", "text"),
    [
        ("{", "INVALID_JSON", "Invalid JSON"),
        ("", "INVALID_JSON", "Invalid JSON"),
        ([], "VALIDATION_ERROR", "be an object"),
        ({"type": "jump"}, "UNKNOWN_TYPE", "reset"),
        ({}, "UNKNOWN_TYPE", "type"),
        ({"type": "step"}, "VALIDATION_ERROR", "data: Field required"),
        ({"type": "step", "data": {"action": "x" * 5000}}, "VALIDATION_ERROR", "4096"),
        ({"type": "reset", "data": {"indx": 1}}, "VALIDATION_ERROR", "indx"),
        ({"type": "reset", "data": {"seed": 10**40, "split": "broken"}}, "EXECUTION_ERROR", "damaged"),
        ({"type": "reset", "data": {"split": "no"}}, "EXECUTION_ERROR", "no task no/"),
        ({"type": "reset", "data": {"split": "broken"}}, "EXECUTION_ERROR", "damaged"),
        ({"type": "step", "data": {"action": "up"}}, "SESSION_ERROR", "reset first"),
    ],
)
async def test_mistakes_leave_the_socket_open(talk: Talk, message: Any, code: str, text: str) -> None:
    kind, data = await talk.ask(message)
    assert (kind, data["code"]) == ("error", code)
    assert text in data["message"]
    assert (await talk.reset(index=0))["done"] is False


async def test_a_failing_environment_loses_the_session_only(talk: Talk) -> None:
    await talk.reset(index=5)
    kind, data = await talk.step("fail")
    assert (kind, "secret" in data["message"]) == ("error", False)
    assert (await talk.step("up"))[1]["code"] == "SESSION_ERROR"
    await talk.reset(index=5)
    assert (await talk.step("up"))[0] == "observation"


async def test_there_are_no_tools(talk: Talk, http: aiohttp.ClientSession, server: ServerProcess) -> None:
    call = {"jsonrpc": "2.0", "id": 10**30, "method": "tools/list"}
    assert await talk.ask({"type": "mcp", "data": call}) == (
        "mcp",
        {"jsonrpc": "2.0", "id": 10**30, "result": {"tools": []}},
    )
    codes = []
    for body in ({"jsonrpc": "2.0", "method": "tools/call"}, {}, []):
        async with http.post(f"{server.url}/mcp", json=body) as response:
            assert response.status == 200
            codes.append((await response.json())["error"]["code"])
    async with http.post(f"{server.url}/mcp", data=b"{") as response:
        codes.append((await response.json())["error"]["code"])
    assert codes == [-32601, -32600, -32600, -32700]


async def test_a_session_ends_with_its_socket(http: aiohttp.ClientSession, server: ServerProcess) -> None:
    for goodbye in (True, False):
        async with http.ws_connect(f"{server.url}/ws") as socket:
            await Talk(socket).reset(index=0)
            assert await live(http, server) == 1
            if goodbye:
                await socket.send_json({"type": "close"})
                assert (await socket.receive(timeout=30)).type is aiohttp.WSMsgType.CLOSE
        async with asyncio.timeout(30):
            while await live(http, server):  # noqa: ASYNC110 - the other process cannot set an event
                await asyncio.sleep(0.01)


async def test_as_many_sockets_as_sessions(http: aiohttp.ClientSession, server: ServerProcess) -> None:
    async with (
        http.ws_connect(f"{server.url}/ws") as first,
        http.ws_connect(f"{server.url}/ws") as second,
        http.ws_connect(f"{server.url}/ws") as third,
    ):
        for socket in (first, second, third):
            await Talk(socket).reset(index=0)
        async with http.ws_connect(f"{server.url}/ws") as fourth:
            answer = await fourth.receive_json(timeout=30)
            assert (answer["data"]["code"], answer["data"]["max_sessions"]) == ("CAPACITY_REACHED", 3)
            assert (await fourth.receive(timeout=30)).type is aiohttp.WSMsgType.CLOSE


async def test_sessions_of_the_step_api_count_too(
    http: aiohttp.ClientSession, server: ServerProcess, talk: Talk
) -> None:
    sessions = []
    for _ in range(3):
        async with http.post(f"{server.url}/reset", json={"split": "train", "index": 1}) as response:
            sessions.append((await response.json())["session"])
    kind, data = await talk.ask({"type": "reset", "data": {}})
    assert (kind, data["code"]) == ("error", "CAPACITY_REACHED")
    for session in sessions:
        await http.post(f"{server.url}/close", json={"session": session})
    await talk.reset(index=0)


async def test_a_long_message_closes_the_socket(talk: Talk) -> None:
    await talk.socket.send_str(json.dumps({"type": "step", "data": {"action": "x" * 9000}}))
    closing = await talk.socket.receive(timeout=30)
    assert (closing.type, closing.data) == (aiohttp.WSMsgType.CLOSE, 1009)


async def test_pages_of_other_sites_are_refused(http: aiohttp.ClientSession, server: ServerProcess) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await http.ws_connect(f"{server.url}/ws", origin="http://evil.example")
    assert caught.value.status == 403
    async with http.ws_connect(f"{server.url}/ws", origin=server.url) as socket:
        await Talk(socket).reset(index=0)


async def test_an_idle_socket_is_closed(serve: Callable[..., ServerProcess], http: aiohttp.ClientSession) -> None:
    server = serve(COUNTING, "--idle-seconds", "0.2")
    async with http.ws_connect(f"{server.url}/ws") as socket:
        await Talk(socket).reset(index=0)
        assert (await socket.receive(timeout=30)).type is aiohttp.WSMsgType.CLOSE
    assert await live(http, server) == 0


async def test_what_json_cannot_hold_ends_the_session_only(
    serve: Callable[..., ServerProcess], http: aiohttp.ClientSession
) -> None:
    server = serve("tests.env_servers.counting:Unspeakable")
    async with http.ws_connect(f"{server.url}/ws") as socket:
        kind, data = await Talk(socket).ask({"type": "reset", "data": {"split": "broken", "index": 0}})
        assert (kind, "the environment failed at reset of broken/0" in data["message"]) == ("error", True)
        for action in ("up", "mumble"):
            await Talk(socket).reset(index=0)
            kind, data = await Talk(socket).step(action)
            assert (kind, "the environment failed at step 1" in data["message"]) == ("error", True)
            assert (await Talk(socket).step("down"))[1]["code"] == "SESSION_ERROR"


async def test_the_token_guards_the_socket(
    serve: Callable[..., ServerProcess], http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WS_TOKEN", "right")
    server = serve(COUNTING, "--token-env", "WS_TOKEN")
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await http.ws_connect(f"{server.url}/ws", headers=headers)
        assert caught.value.status == 401
    async with http.ws_connect(f"{server.url}/ws", headers={"Authorization": "Bearer right"}) as socket:
        await Talk(socket).reset(index=0)
