"""Our client against servers made with the real OpenEnv package."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable

import pytest
from aiohttp import web

from env_servers.client import (
    EnvironmentUnavailableError,
    HttpClient,
    OpenEnvClient,
    RequestRejected,
    SessionLost,
    open_client,
)
from env_servers.clients.openenv import FAILURES_IN_A_ROW
from env_servers.conformance.run import Options, check_server
from env_servers.launch import ServerProcess
from env_servers.protocol import ResetRequest

TASK = ResetRequest(split="train", index=7, max_steps=4)


@pytest.fixture(scope="module")
def plain(echo: Callable[..., ServerProcess]) -> ServerProcess:
    return echo("plain")


@pytest.fixture(scope="module")
def tools(echo: Callable[..., ServerProcess]) -> ServerProcess:
    return echo("tools")


@pytest.fixture
async def client(plain: ServerProcess) -> AsyncIterator[OpenEnvClient]:
    client = OpenEnvClient(plain.url, patience_s=5.0)
    yield client
    await client.close()


async def test_info(client: OpenEnvClient) -> None:
    info = await client.info()
    assert (info.name, info.engine, info.anchors) == ("PlainEcho", "openenv", ["observation"])
    assert set(info.splits) == {"train", "test"}


async def test_an_episode_that_ends_by_itself(client: OpenEnvClient) -> None:
    first = await client.reset(TASK)
    assert (first.step, first.observation, first.anchor, first.done) == (0, "ready 7", "ready 7", False)
    second = await client.step(first.session, 1, "hello")
    assert (second.observation, second.reward, second.facts) == ("hello", 0.5, {"message_length": 5})
    last = await client.step(first.session, 2, "bye")
    assert (last.terminated, last.truncated) == (True, False)
    assert await client.step(first.session, 2, "bye") == last
    with pytest.raises(RequestRejected, match="ended with step 2"):
        await client.step(first.session, 3, "more")
    await client.close_session(first.session)
    with pytest.raises(SessionLost):
        await client.step(first.session, 3, "more")


async def test_the_step_limit_truncates(client: OpenEnvClient) -> None:
    session = (await client.reset(TASK)).session
    for step in range(1, 4):
        assert not (await client.step(session, step, "on")).done
    last = await client.step(session, 4, "on")
    assert (last.terminated, last.truncated) == (False, True)


async def test_splits_have_seeds_of_their_own(client: OpenEnvClient) -> None:
    assert (await client.reset(ResetRequest(split="test", index=7))).observation == "ready 1000007"
    for bad in (
        ResetRequest(split="none", index=0),
        ResetRequest(split="train", index=10**9),
        ResetRequest(split="train", index=0, anchor="state"),
        ResetRequest(split="train", index=0, expert=True),
    ):
        with pytest.raises(RequestRejected):
            await client.reset(bad)


async def test_steps_out_of_order_and_repeats(client: OpenEnvClient) -> None:
    session = (await client.reset(TASK)).session
    with pytest.raises(RequestRejected, match="next step is 1"):
        await client.step(session, 2, "x")
    answers = await asyncio.gather(*(client.step(session, 1, "same") for _ in range(5)))
    assert all(answer == answers[0] for answer in answers)
    assert (await client.step(session, 2, "next")).observation == "next"


async def test_many_sessions_do_not_mix(client: OpenEnvClient) -> None:
    async def play(number: int) -> None:
        session = (await client.reset(TASK)).session
        for step in range(1, 4):
            said = f"{number}-{step}"
            assert (await client.step(session, step, said)).observation == said
        await client.close_session(session)

    await asyncio.gather(*(play(number) for number in range(32)))


async def test_an_action_may_be_json(client: OpenEnvClient) -> None:
    session = (await client.reset(TASK)).session
    assert (await client.step(session, 1, '{"message": "from json"}')).observation == "from json"
    assert (await client.step(session, 2, '{"loud": true}')).observation == '{"loud": true}'
    refused = await client.step(session, 3, '{"message": 5}')
    assert "message: Input should be a valid string" in refused.observation
    assert (refused.accepted, refused.reward, refused.truncated) == (False, 0.0, False)
    last = await client.step(session, 4, "still here")
    assert (last.observation, last.step, last.truncated) == ("still here", 4, True)


async def test_tools(tools: ServerProcess) -> None:
    client = OpenEnvClient(tools.url, timeout_s=60.0)
    first = await client.reset(TASK)
    assert "echo_message[message]: Say the message again." in first.observation
    session = first.session
    assert (await client.step(session, 1, "echo_message[Hello [you]!]")).observation == "Hello [you]!"
    twice = await client.step(session, 2, 'echo_with_length[{"message": "ab", "times": 2}]')
    assert twice.observation == '{"length": 4, "message": "abab"}'
    whole = '{"tool_name": "echo_message", "arguments": {"message": "plain"}}'
    assert (await client.step(session, 3, whole)).observation == "plain"
    assert (await client.step(session, 4, "echo_message[a]")).truncated
    await client.close()


async def test_a_malformed_call_is_a_transition(tools: ServerProcess) -> None:
    client = OpenEnvClient(tools.url, timeout_s=60.0)
    session = (await client.reset(TASK.model_copy(update={"max_steps": 20}))).session
    step = 0
    for wrong, text in (
        ("hello", "must be tool[argument]"),
        ("", "must be tool[argument]"),
        ('{"tool_name": "echo_message", "arg', "must be tool[argument]"),
        ("shout[x]", "no tool 'shout', the tools are echo_message, echo_with_length"),
        ("echo_with_length[ab]", "must be a JSON object"),
        ('echo_with_length[{"message": "a"}]', "times"),
        ('echo_with_length[{"message": "a", "times": "many"}]', "times"),
        ('{"name": "echo_message"}', "tool_name"),
        ('{"tool_name": "shout"}', "Unknown tool: 'shout'"),
        ('{"tool_name": "echo_message", "arguments": "x"}', "valid dictionary"),
        ('{"tool_name": "echo_message", "arguments": {"message": %s}}' % ("9" * 60), "as JSON"),
        ('{"a":' * 3000, "must be tool[argument]"),
        ("echo_message[\ud800]", "as JSON"),
    ):
        step += 1
        seen = await client.step(session, step, wrong)
        assert text in seen.observation
        assert (seen.step, seen.accepted, seen.reward, seen.done) == (step, False, 0.0, False)
        good = await client.step(session, step + 1, "echo_message[fine]") if step == 1 else None
        if good is not None:
            step += 1
            assert (good.observation, good.accepted, good.step) == ("fine", True, 2)
    assert (await client.step(session, step + 1, 'echo_message[{"text": 1}]')).observation == '{"text": 1}'
    await client.close()


async def test_examples_are_valid_calls(tools: ServerProcess) -> None:
    client = OpenEnvClient(tools.url, timeout_s=60.0)
    session = (await client.reset(TASK.model_copy(update={"max_steps": None}))).session
    calls = await client.example_actions(12)
    assert {call.partition("[")[0] for call in calls} == {"echo_message", "echo_with_length"}
    for step, call in enumerate(calls, 1):
        assert (await client.step(session, step, call)).accepted
    await client.close()


async def test_a_killed_server_loses_the_session_and_then_is_unavailable(
    echo: Callable[..., ServerProcess],
) -> None:
    server = echo("plain")
    client = OpenEnvClient(server.url, patience_s=0.3)
    session = (await client.reset(TASK)).session
    os.kill(server.pid, signal.SIGKILL)
    with pytest.raises(SessionLost, match="socket is lost"):
        await client.step(session, 1, "anyone?")
    with pytest.raises(EnvironmentUnavailableError, match="is unavailable"):
        await client.reset(TASK)
    await client.close()


async def test_a_full_server_is_waited_for(echo: Callable[..., ServerProcess]) -> None:
    client = OpenEnvClient(echo("plain", "--sessions", "1").url)
    first = await client.reset(TASK)
    second = asyncio.create_task(client.reset(TASK))
    await asyncio.wait([second], timeout=0.3)
    assert not second.done()
    await client.close_session(first.session)
    assert (await second).observation == "ready 7"
    await client.close()


async def test_the_address_names_the_protocol(plain: ServerProcess) -> None:
    client = open_client(f"openenv+{plain.url}")
    assert isinstance(client, OpenEnvClient)
    assert (await client.reset(TASK)).observation == "ready 7"
    await client.close()
    assert isinstance(open_client(plain.url), HttpClient)


class Misrewarding:
    """A server whose answer to a message of kind `bad` has the reward `reward`. It counts its open sockets."""

    def __init__(self, bad: str, reward: object) -> None:
        self.bad, self.reward = bad, reward
        self.open = 0

    async def schema(self, _: web.Request) -> web.Response:
        return web.json_response({"action": {"properties": {"message": {"type": "string"}}, "required": ["message"]}})

    async def play(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.open += 1
        async for message in socket:
            reward = self.reward if message.json()["type"] == self.bad else 1
            await socket.send_json({"type": "observation", "data": {"observation": {"text": "x"}, "reward": reward}})
        self.open -= 1
        return socket


@pytest.mark.parametrize("bad", ["reset", "step"])
@pytest.mark.parametrize("reward", ["high", [1], {"a": 1}])
async def test_a_reward_that_is_no_number_is_the_servers_fault(bad: str, reward: object) -> None:
    server = Misrewarding(bad, reward)
    app = web.Application()
    app.add_routes([web.get("/schema", server.schema), web.get("/ws", server.play)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    client = OpenEnvClient(f"http://127.0.0.1:{runner.addresses[0][1]}")

    async def play() -> None:
        await client.step((await client.reset(TASK)).session, 1, "hello")

    with pytest.raises(RequestRejected, match=r"invalid value: reward is .*, not a finite number"):
        await play()
    async with asyncio.timeout(30):
        while server.open:  # noqa: ASYNC110 - the server sees the end of its socket later
            await asyncio.sleep(0)
    await client.close()
    await runner.cleanup()


class Failing:
    """A server whose environment fails at the action `bad`, and answers `rpc` and `half` in odd ways."""

    async def schema(self, _: web.Request) -> web.Response:
        return web.json_response({"action": {"properties": {"message": {"type": "string"}}, "required": ["message"]}})

    async def play(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            data = message.json().get("data", {})
            match data.get("message"):
                case "bad":
                    failure = {"message": "no such move", "code": "EXECUTION_ERROR"}
                    await socket.send_json({"type": "error", "data": failure})
                case "rpc":
                    rpc = {"jsonrpc": "2.0", "id": 1, "error": {"code": -32602, "message": "Invalid params"}}
                    await socket.send_json({"type": "mcp", "data": rpc})
                case "half":
                    await socket.send_json({"type": "observation", "data": {"observation": {"text": "a\ud800b"}}})
                case _:
                    await socket.send_json({"type": "observation", "data": {"observation": {"text": "x"}, "reward": 1}})
        return socket


async def test_an_environment_that_fails_at_an_action(unused_tcp_port: int) -> None:
    server = Failing()
    app = web.Application()
    app.add_routes([web.get("/schema", server.schema), web.get("/ws", server.play)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", unused_tcp_port).start()
    client = OpenEnvClient(f"http://127.0.0.1:{unused_tcp_port}")
    session = (await client.reset(TASK.model_copy(update={"max_steps": 50}))).session
    step = 0
    for action in ("bad", "good", "rpc", "bad", "bad", "bad"):
        step += 1
        seen = await client.step(session, step, action)
        assert (seen.step, seen.accepted, seen.reward) == (step, action == "good", float(action == "good"))
        said = {"bad": "no such move", "rpc": "Invalid params", "good": "x"}[action]
        assert seen.observation.endswith(said)
    with pytest.raises(RequestRejected, match="failed at 4 consecutive steps"):
        await client.step(session, step + 1, "bad")
    assert (await client.step(session, step + 1, "half")).observation == "a\ufffdb"
    step, other = step + 1, (await client.reset(TASK)).session
    assert (await client.step(other, 1, "good")).accepted
    for number in range(1, 2 * FAILURES_IN_A_ROW):
        if number == FAILURES_IN_A_ROW - 1:  # the environment works meanwhile
            assert (await client.step(other, 2, "good")).accepted
        assert not (await client.step(session, step + number, "bad")).accepted
    await client.close()
    await runner.cleanup()


async def test_other_servers_are_recognised() -> None:
    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhi")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(respond, "127.0.0.1", 0) as other:
        client = OpenEnvClient(f"http://127.0.0.1:{other.sockets[0].getsockname()[1]}", patience_s=0.1)
        with pytest.raises(EnvironmentUnavailableError, match="no OpenEnv server"):
            await client.info()
        await client.close()
    with pytest.raises(ValueError, match="http://host:port"):
        OpenEnvClient("localhost")


@pytest.mark.parametrize("kind", ["tools", "plain"])
async def test_the_check_plays_a_real_server(kind: str, echo: Callable[..., ServerProcess]) -> None:
    options = Options(tasks=2, steps=4, sessions=4, seconds=0.2)
    server = echo(kind)
    report = await check_server(f"openenv+{server.url}", options=options)
    assert [finding.seen for finding in report.findings if finding.verdict == "fail"] == []
    notes = {note.check: note.seen for note in report.notes}
    assert notes["actions"].startswith("16 of 16 were accepted")
    assert "no won" in notes["facts"]
