"""Many sessions at once without an error, and a server that does not grow with what it has answered."""

from __future__ import annotations

import asyncio
import gc
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import aiohttp
import httpx
import psutil
import pytest

from env_servers.client import HttpClient, RequestRejected, SessionLost
from env_servers.launch import ServerProcess
from env_servers.protocol import ResetRequest
from env_servers.registry import ENVIRONMENTS
from tests.env_servers.launching import COUNTING, launch

SESSIONS = 1000
STEPS = 5
MIB = 2**20
QUICK = [name for name in ENVIRONMENTS if not name.endswith("-textworld")]


@pytest.fixture
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServerProcess]]:
    with ExitStack() as servers:

        def start(environment: str, *options: str) -> ServerProcess:
            return servers.enter_context(launch(tmp_path_factory.mktemp("server") / "ready", environment, *options))

        yield start


@pytest.mark.parametrize(
    ("environment", "workers", "coalesce"),
    [
        *((name, "1", True) for name in QUICK),
        (COUNTING, "1", False),
        (COUNTING, "2", True),
        (COUNTING, "2", False),
    ],
)
async def test_a_thousand_sessions_at_once(
    serve: Callable[..., ServerProcess], environment: str, workers: str, coalesce: bool
) -> None:
    server = serve(environment, "--workers", workers)
    client = HttpClient(server.url, coalesce=coalesce, connections=128)
    split = next(iter((await client.info()).splits))
    opened = 0
    all_are_open = asyncio.Event()

    async def play(number: int) -> None:
        nonlocal opened
        seen = await client.reset(ResetRequest(split=split, index=9 + number % 32, max_steps=STEPS))
        opened += 1
        if opened == SESSIONS:
            all_are_open.set()
        await all_are_open.wait()
        for step in range(1, STEPS + 1):
            choices = seen.admissible or ["up"]
            seen = await client.step(seen.session, step, choices[(number + step) % len(choices)])
            assert seen.step == step
            if seen.done:
                break
        assert seen.done
        await client.close_session(seen.session)

    await asyncio.gather(*(play(number) for number in range(SESSIONS)))
    await client.close()
    async with httpx.AsyncClient() as http:
        assert "anchorage_env_sessions 0.0" in (await http.get(f"{server.url}/metrics")).text


async def test_a_thousand_sockets_at_once(serve: Callable[..., ServerProcess]) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    url = serve(COUNTING).url
    all_are_open = asyncio.Barrier(SESSIONS)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:

        async def play(number: int) -> str:
            async with http.ws_connect(f"{url}/ws") as socket:
                await socket.send_json({"type": "reset", "data": {"index": number % 50}})
                await socket.receive_json(timeout=60)
                await all_are_open.wait()
                await socket.send_json({"type": "step", "data": {"action": "up"}})
                answer = await socket.receive_json(timeout=60)
                return str(answer["data"]["observation"]["text"])

        texts = await asyncio.gather(*(play(number) for number in range(SESSIONS)))
    assert texts == [f"The count is 1, the target is {number % 50 + 2}." for number in range(SESSIONS)]


async def test_memory_does_not_grow_with_what_was_answered(serve: Callable[..., ServerProcess]) -> None:
    server = serve(COUNTING)
    client = HttpClient(server.url, connections=32)
    process = psutil.Process(server.pid)
    rng = random.Random(0)

    async def visit() -> None:
        seen = await client.reset(ResetRequest(split="train", index=rng.randrange(50)))
        await client.step(seen.session, 1, rng.choice(["up", "down", "x" * 4000]))
        if rng.random() < 0.2:
            with pytest.raises(RequestRejected):
                await client.step(seen.session, 2, "fail")
        if rng.random() < 0.2:
            with pytest.raises(RequestRejected):
                await client.reset(ResetRequest(split=str(rng.random()), index=0))
        await client.close_session(seen.session)
        with pytest.raises(SessionLost):
            await client.step(f"{seen.session}{rng.random()}", 1, "up")

    async def sockets() -> None:
        async with aiohttp.ClientSession() as http, http.ws_connect(f"{server.url}/ws") as socket:
            for message in ("{", '{"type": "reset"}', '{"type": "step", "data": {"action": "up"}}', "[]"):
                await socket.send_str(message)
                await socket.receive(timeout=30)

    async def rounds(count: int) -> int:
        for _ in range(count):
            await asyncio.gather(*(visit() for _ in range(250)), *(sockets() for _ in range(20)))
        gc.collect()
        return int(process.memory_info().rss)

    before = await rounds(4)
    after = await rounds(8)
    await client.close()
    assert after - before < 4 * MIB
