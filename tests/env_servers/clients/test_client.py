"""Both clients, the HTTP one against a real server process that is killed and restarted under it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from env_servers.client import (
    EnvironmentClient,
    EnvironmentUnavailableError,
    HttpClient,
    RequestRejected,
    SessionLost,
)
from env_servers.clients.local import LocalClient
from env_servers.launch import ServerProcess
from env_servers.protocol import Problem, ResetRequest, StepRequest, StepResult
from tests.env_servers.counting import Counting, Gated
from tests.env_servers.launching import COUNTING, launch

TOKEN = "right"
TASK = ResetRequest(split="train", index=3)


def start(folder: Path, port: int = 0, *more: str) -> ServerProcess:
    return launch(folder / "ready", COUNTING, "--port", str(port), "--token-env", "TEST_TOKEN", *more)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_TOKEN", TOKEN)
        with start(tmp_path_factory.mktemp("server")) as process:
            yield process


@pytest.fixture(params=["http", "local"])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[EnvironmentClient]:
    made: EnvironmentClient
    if request.param == "http":
        made = HttpClient(request.getfixturevalue("server").url, token=TOKEN)
    else:
        made = LocalClient(Counting)
    yield made
    await made.close()


async def test_play(client: EnvironmentClient) -> None:
    assert (await client.info()).name == "counting"
    state = await client.reset(TASK)
    while not state.done:
        state = await client.step(state.session, state.step + 1, "up")
    assert (state.step, state.reward, state.facts) == (5, 1.0, {"won": True})
    assert await client.step(state.session, 5, "up") == state
    await client.close_session(state.session)
    await client.close_session(state.session)
    with pytest.raises(SessionLost, match="closed"):
        await client.step(state.session, 5, "up")


async def test_refusals(client: EnvironmentClient) -> None:
    with pytest.raises(RequestRejected, match="no task"):
        await client.reset(ResetRequest(split="none", index=0))
    with pytest.raises(RequestRejected, match="damaged"):
        await client.reset(ResetRequest(split="broken", index=0))
    with pytest.raises(SessionLost, match="no such session"):
        await client.step("unknown", 1, "up")
    session = (await client.reset(TASK)).session
    with pytest.raises(RequestRejected, match="next step is 1"):
        await client.step(session, 2, "up")
    with pytest.raises(RequestRejected, match="failed at step 1"):
        await client.step(session, 1, "fail")


async def test_text_that_json_cannot_hold_is_refused(server: ServerProcess) -> None:
    client = HttpClient(server.url, token=TOKEN)
    with pytest.raises(RequestRejected, match="Unicode"):
        await client.step("any", 1, "\ud800")
    await client.close()


async def test_batches(server: ServerProcess) -> None:
    client = HttpClient(server.url, token=TOKEN)
    first, unknown = await client.reset_many([TASK, ResetRequest(split="none", index=0)])
    assert isinstance(first, StepResult)
    assert isinstance(unknown, Problem)
    stepped, lost = await client.step_many(
        [StepRequest(session=first.session, step=1, action="up"), StepRequest(session="x", step=1, action="up")]
    )
    assert isinstance(stepped, StepResult)
    assert (stepped.session, stepped.step) == (first.session, 1)
    assert isinstance(lost, Problem)
    await client.close()


async def test_the_wrong_token(server: ServerProcess) -> None:
    client = HttpClient(server.url, token="wrong")
    with pytest.raises(RequestRejected, match="bearer token"):
        await client.info()
    await client.close()


async def test_a_killed_and_restarted_server_has_lost_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_TOKEN", TOKEN)
    old = start(tmp_path)
    client = HttpClient(old.url, token=TOKEN)
    state = await client.reset(TASK)
    os.kill(old.pid, signal.SIGKILL)
    old.stop()
    step = asyncio.create_task(client.step(state.session, 1, "up"))
    with await asyncio.to_thread(start, tmp_path, int(old.url.rpartition(":")[2])):
        with pytest.raises(SessionLost, match="no such session"):
            await step
        assert (await client.reset(TASK)).step == 0
        await client.close()


async def test_a_server_that_stays_away_ends_in_one_clear_error(closed_port: int) -> None:
    client = HttpClient(f"http://127.0.0.1:{closed_port}", patience_s=1.0)
    with pytest.raises(
        EnvironmentUnavailableError, match=rf"127\.0\.0\.1:{closed_port} is unavailable \(([2-9]|\d\d) attempts"
    ):
        await client.info()
    await client.close_session("any")
    await client.close()


async def test_a_busy_server_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_TOKEN", TOKEN)
    with start(tmp_path, 0, "--max-sessions", "1") as server:
        client = HttpClient(server.url, token=TOKEN)
        first = await client.reset(TASK)
        second = asyncio.create_task(client.reset(TASK))
        await asyncio.wait([second], timeout=0.2)
        assert not second.done()
        await client.close_session(first.session)
        assert (await second).session != first.session
        impatient = HttpClient(server.url, token=TOKEN, patience_s=0.1)
        with pytest.raises(EnvironmentUnavailableError, match="503: all 1 sessions"):
            await impatient.reset(TASK)
        await client.close()
        await impatient.close()


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "does not speak the step API"),
        (b"HTTP/1.1 302 Found\r\nlocation: /\r\ncontent-length: 0\r\n\r\n", "no environment server"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", r"does not speak HTTP: [^\n]*$"),
        (b"", "is unavailable"),
    ],
)
async def test_other_servers_are_recognised(answer: bytes, text: str) -> None:
    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    other = await asyncio.start_server(respond, "127.0.0.1", 0)
    port = other.sockets[0].getsockname()[1]
    async with other:
        client = HttpClient(f"http://127.0.0.1:{port}", patience_s=0.1)
        with pytest.raises(EnvironmentUnavailableError, match=text):
            await client.info()
        await client.close()


async def test_a_server_that_never_answers_is_given_up() -> None:
    async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(ignore, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    async with silent:
        client = HttpClient(f"http://127.0.0.1:{port}", timeout_s=0.05, patience_s=0.2)
        with pytest.raises(EnvironmentUnavailableError, match=r"no answer within 0\.05 s"):
            await client.info()
        await client.close()


@pytest.mark.parametrize("url", ["", "localhost:8001", "ftp://x", "http://"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="http://host:port"):
        HttpClient(url)


async def test_a_blocking_environment_leaves_the_loop_free() -> None:
    Gated.gate.clear()
    client = LocalClient(Gated)
    state = await client.reset(TASK)
    step = asyncio.create_task(client.step(state.session, 1, "up"))
    assert (await client.info()).name == "gated"
    assert not step.done()
    Gated.gate.set()
    assert (await step).step == 1
    await client.close()
