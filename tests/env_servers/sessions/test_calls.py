"""Blocking calls: bounded in time and number, and what becomes of those that hang."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from env_servers.sessions.calls import BlockingCalls, CallTimeout, NoThread

LIMIT_S = 0.05


class Hanging:
    """Calls that return when they are told to."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.ended = threading.Semaphore(0)

    def __call__(self) -> str:
        assert self.go_on.wait(30)
        return "late"

    def afterwards(self, result: str | None) -> None:
        self.results = result
        self.ended.release()


@pytest.fixture
async def hanging() -> AsyncIterator[Hanging]:
    call = Hanging()
    yield call
    call.go_on.set()


async def give_up(calls: BlockingCalls, call: Hanging) -> None:
    with pytest.raises(CallTimeout, match=r"no answer within 0\.05 s"):
        await calls.run(call, call.afterwards)


async def settle(calls: BlockingCalls, call: Hanging, count: int) -> None:
    call.go_on.set()
    for _ in range(count):
        assert await asyncio.to_thread(call.ended.acquire, timeout=30)
    async with asyncio.timeout(30):
        while calls.given_up:  # noqa: ASYNC110 - the last word of a thread is its own
            await asyncio.sleep(0)


async def test_results_and_errors_come_back() -> None:
    calls = BlockingCalls("test", 2, 30.0)
    assert await asyncio.gather(*(calls.run(lambda n=n: n * n) for n in range(9))) == [n * n for n in range(9)]  # type: ignore[misc]

    def fail(error: BaseException) -> None:
        raise error

    for error, shown in ((KeyError("x"), KeyError), (StopIteration(), RuntimeError), (SystemExit(3), RuntimeError)):
        with pytest.raises(shown):
            await calls.run(lambda error=error: fail(error))  # type: ignore[misc]
    with pytest.raises(TimeoutError):
        await calls.run(lambda: fail(TimeoutError()))
    assert calls.given_up == 0


async def test_no_more_at_once_than_threads() -> None:
    calls = BlockingCalls("test", 2, 30.0)
    now = most = 0
    lock, third = threading.Lock(), threading.Event()

    def enter() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            if now > 2:
                third.set()
        third.wait(0.02)
        with lock:
            now -= 1

    await asyncio.gather(*(calls.run(enter) for _ in range(6)))
    assert most == 2


async def test_a_call_that_hangs_is_given_up_and_others_take_its_place(hanging: Hanging) -> None:
    calls = BlockingCalls("test", 1, LIMIT_S)
    await give_up(calls, hanging)
    assert (calls.given_up, calls.exhausted) == (1, True)
    assert await calls.run(lambda: "next") == "next"
    await settle(calls, hanging, 1)
    assert (hanging.results, calls.exhausted) == ("late", False)


async def test_threads_are_bounded_however_many_calls_hang(hanging: Hanging) -> None:
    calls = BlockingCalls("test", 2, LIMIT_S)
    before = threading.active_count()
    for _ in range(4):
        await give_up(calls, hanging)
    with pytest.raises(NoThread, match="no thread was free"):
        await calls.run(lambda: "never")
    assert threading.active_count() - before <= 4
    await settle(calls, hanging, 4)
    assert await asyncio.gather(*(calls.run(lambda: 1) for _ in range(4))) == [1] * 4


async def test_who_leaves_gives_the_call_up(hanging: Hanging) -> None:
    calls = BlockingCalls("test", 1, 30.0)
    waiting = asyncio.create_task(calls.run(hanging, hanging.afterwards))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await calls.run(lambda: "next") == "next"
    await settle(calls, hanging, 1)
