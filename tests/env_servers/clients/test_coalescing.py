"""Steps that travel together: each gets its own answer or error, and none waits for company."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import httpx
import pytest

from env_servers.client import EnvironmentUnavailableError, HttpClient, RequestRejected, SessionLost
from env_servers.clients.coalescing import IN_FLIGHT, MOST_BYTES, MOST_STEPS, Coalescer
from env_servers.launch import ServerProcess
from env_servers.protocol import Problem, ResetRequest, StepResult
from tests.env_servers.launching import launch


class Line:
    """Stands for the network: keeps each batch until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[bytes]] = []
        self.gates: list[asyncio.Future[None]] = []

    async def send(self, batch: Sequence[bytes]) -> list[Problem]:
        gate = asyncio.get_running_loop().create_future()
        self.batches.append(list(batch))
        self.gates.append(gate)
        await gate
        return [Problem(title="t", status=200, detail=item.decode()) for item in batch]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_lonely_step_goes_at_once() -> None:
    line = Line()
    call = asyncio.create_task(Coalescer(line.send).step(b"one"))
    await settle()
    assert line.batches == [[b"one"]]
    line.gates[0].set_result(None)
    assert (await call).detail == "one"  # type: ignore[union-attr]


async def test_what_comes_together_goes_together_and_the_rest_when_there_is_room() -> None:
    line = Line()
    coalescer = Coalescer(line.send)
    calls = [asyncio.create_task(coalescer.step(b"%d" % number)) for number in range(2 * MOST_STEPS + 5)]
    await settle()
    assert [len(batch) for batch in line.batches] == [MOST_STEPS]
    calls += [asyncio.create_task(coalescer.step(b"late"))]
    await settle()
    assert [len(batch) for batch in line.batches] == [MOST_STEPS] * IN_FLIGHT
    for gate in line.gates[:2]:
        gate.set_result(None)
    await settle()
    assert [len(batch) for batch in line.batches[2:]] == [6]
    line.gates[2].set_result(None)
    answers = [answer.detail for answer in await asyncio.gather(*calls) if isinstance(answer, Problem)]
    assert answers == [*map(str, range(2 * MOST_STEPS + 5)), "late"]


async def test_long_steps_make_short_batches() -> None:
    line = Line()
    coalescer = Coalescer(line.send)
    calls = [asyncio.create_task(coalescer.step(b"x" * (MOST_BYTES // 2 + 1))) for _ in range(3)]
    await settle()
    assert len(line.batches[0]) == 2
    await coalescer.close()
    assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*calls, return_exceptions=True))


async def test_a_failure_reaches_every_step_of_its_batch_and_a_caller_that_left_none() -> None:
    async def fail(_: Sequence[bytes]) -> list[Problem]:
        raise EnvironmentUnavailableError("away")

    coalescer = Coalescer(fail)
    calls = [asyncio.create_task(coalescer.step(b"x")) for _ in range(3)]
    await asyncio.sleep(0)
    calls[1].cancel()
    first, second, third = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(first, EnvironmentUnavailableError)
    assert isinstance(second, asyncio.CancelledError)
    assert isinstance(third, EnvironmentUnavailableError)


async def single_steps(server: ServerProcess) -> float:
    """How many requests for a single step the server has seen."""
    async with httpx.AsyncClient() as http:
        page = (await http.get(f"{server.url}/metrics")).text
    name = 'anchorage_env_request_seconds_count{route="/step"}'
    return float(next(line.split()[-1] for line in page.splitlines() if line.startswith(name)))


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ServerProcess]:
    with launch(tmp_path / "ready") as process:
        yield process


async def test_each_session_of_a_batch_meets_its_own_end(server: ServerProcess) -> None:
    client = HttpClient(server.url)
    task = ResetRequest(split="train", index=3)
    opened = await asyncio.gather(*(client.reset(task) for _ in range(21)))
    *sessions, refused = [first.session for first in opened]
    await client.close_session(sessions[0])
    calls = [client.step(session, 1, "up") for session in sessions]
    calls += [client.step(sessions[1], 7, "up"), client.step(refused, 1, "x" * 5000), client.step("x", 1, "up")]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(results[0], SessionLost)
    assert all(isinstance(result, StepResult) and result.step == 1 for result in results[1:20])
    assert isinstance(results[20], RequestRejected)
    assert isinstance(results[21], StepResult)
    assert not results[21].accepted
    assert isinstance(results[22], SessionLost)
    await client.close()
    assert await single_steps(server) == 0


async def test_slow_environments_are_asked_one_by_one(tmp_path: Path) -> None:
    with launch(tmp_path / "ready", "tests.env_servers.counting:Patient") as process:
        client = HttpClient(process.url)
        assert (await client.info()).batching is False
        opened = await asyncio.gather(*(client.reset(ResetRequest(split="train", index=3)) for _ in range(8)))
        await asyncio.gather(*(client.step(first.session, 1, "up") for first in opened))
        await client.close()
        assert await single_steps(process) == 8
