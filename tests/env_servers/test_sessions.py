"""The session table: step numbers, endings, limits, blocking environments."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Iterator

import pytest

from env_servers.environment import BrokenTask, Environment, Observation, UnknownTask
from env_servers.protocol import ResetRequest, StepRequest
from env_servers.sessions import (
    REMEMBERED,
    AnchorUnsupported,
    Busy,
    Conflict,
    EnvironmentFault,
    SessionTable,
    SessionUnknown,
)
from tests.env_servers.counting import Counting, Gated, Stateless


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Closes(Counting):
    """Counts how often its sessions were closed."""

    count = 0

    def close(self) -> None:
        type(self).count += 1


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> SessionTable:
    Closes.count = 0
    return SessionTable(Closes, max_sessions=4, idle_seconds=100.0, clock=clock)


@pytest.fixture
async def gated() -> AsyncIterator[SessionTable]:
    Gated.gate.clear()
    Gated.entered.clear()
    table = SessionTable(Gated, threads=2)
    yield table
    Gated.gate.set()
    table.shutdown()


def task(index: int = 3, **more: object) -> ResetRequest:
    return ResetRequest.model_validate({"split": "train", "index": index, **more})


def act(session: str, step: int, action: str = "up") -> StepRequest:
    return StepRequest(session=session, step=step, action=action)


async def test_an_episode_from_reset_to_its_end(table: SessionTable) -> None:
    first = await table.reset(task(0, expert=True))
    assert (first.step, first.reward, first.done, first.expert) == (0, 0.0, False, "up")
    assert first.admissible == ["down", "up"]
    await table.step(act(first.session, 1))
    last = await table.step(act(first.session, 2))
    assert (last.step, last.reward, last.terminated, last.truncated) == (2, 1.0, True, False)
    assert last.facts == {"won": True}


async def test_a_repeated_step_is_taken_once(table: SessionTable) -> None:
    session = (await table.reset(task())).session
    answer = await table.step(act(session, 1))
    assert await table.step(act(session, 1)) == answer
    assert (await table.step(act(session, 2))).observation.startswith("The count is 2")
    assert (table.counts.steps, table.counts.repeats) == (2, 1)


@pytest.mark.parametrize("number", [1, 4, 10**30])
async def test_any_other_number_is_a_conflict(table: SessionTable, number: int) -> None:
    session = (await table.reset(task())).session
    for step in (1, 2):
        await table.step(act(session, step))
    with pytest.raises(Conflict, match="next step is 3"):
        await table.step(act(session, number))
    assert (await table.step(act(session, 3))).step == 3


async def test_no_step_after_the_end_but_its_repeat(table: SessionTable) -> None:
    session = (await table.reset(task(0))).session
    await table.step(act(session, 1))
    last = await table.step(act(session, 2))
    with pytest.raises(Conflict, match="ended with step 2"):
        await table.step(act(session, 3))
    assert await table.step(act(session, 2)) == last


async def test_the_step_limit_truncates(table: SessionTable) -> None:
    session = (await table.reset(task(9, max_steps=2))).session
    assert not (await table.step(act(session, 1))).done
    last = await table.step(act(session, 2))
    assert (last.terminated, last.truncated) == (False, True)
    with pytest.raises(Conflict):
        await table.step(act(session, 3))


async def test_winning_at_the_step_limit_is_no_truncation(table: SessionTable) -> None:
    session = (await table.reset(task(0, max_steps=2))).session
    await table.step(act(session, 1))
    last = await table.step(act(session, 2))
    assert (last.terminated, last.truncated) == (True, False)


async def test_anchors(table: SessionTable) -> None:
    by_text = await table.reset(task(1))
    assert by_text.anchor == by_text.observation
    by_state = await table.reset(task(1, anchor="state"))
    assert by_state.anchor == "0/3"
    assert (await table.step(act(by_state.session, 1))).anchor == "1/3"


async def test_an_anchor_the_environment_lacks_is_refused() -> None:
    table = SessionTable(Stateless)
    with pytest.raises(AnchorUnsupported):
        await table.reset(task(1, anchor="state"))
    assert table.live == 0


async def test_closed_expired_and_unknown_are_told_apart(table: SessionTable, clock: Clock) -> None:
    closed, idle = [(await table.reset(task())).session for _ in range(2)]
    table.close(closed)
    table.close(closed)
    clock.now = 99.0
    await table.step(act(idle, 1))
    clock.now = 198.0
    await table.step(act(idle, 2))
    clock.now = 299.0
    endings = []
    for session in (closed, idle, "never"):
        with pytest.raises(SessionUnknown) as caught:
            await table.step(act(session, 3))
        endings.append(caught.value.ending)
    assert endings == ["closed", "expired", None]
    assert (table.live, Closes.count, table.counts.expired) == (0, 2, 1)
    with pytest.raises(SessionUnknown):
        table.close("never")


async def test_the_sweep_closes_idle_sessions_only(table: SessionTable, clock: Clock) -> None:
    await table.reset(task())
    clock.now = 60.0
    await table.reset(task())
    clock.now = 120.0
    assert table.expire() == 1
    assert table.live == 1


async def test_the_session_limit_and_room_made_by_expiry(table: SessionTable, clock: Clock) -> None:
    for _ in range(4):
        await table.reset(task())
    with pytest.raises(Busy, match="all 4 sessions"):
        await table.reset(task())
    clock.now = 101.0
    await table.reset(task())
    assert table.live == 1


@pytest.mark.parametrize(
    ("split", "index", "error"), [("none", 0, UnknownTask), ("train", 999, UnknownTask), ("broken", 0, BrokenTask)]
)
async def test_bad_tasks_leave_nothing_behind(
    table: SessionTable, split: str, index: int, error: type[Exception]
) -> None:
    with pytest.raises(error):
        await table.reset(ResetRequest(split=split, index=index))
    assert (table.live, Closes.count) == (0, 1)


@pytest.mark.parametrize("action", ["fail", "nan"])
async def test_a_failing_environment_loses_its_session_only(table: SessionTable, action: str) -> None:
    good, bad = [(await table.reset(task())).session for _ in range(2)]
    with pytest.raises(EnvironmentFault) as caught:
        await table.step(act(bad, 1, action))
    assert "secret" not in str(caught.value)
    with pytest.raises(SessionUnknown, match="failed"):
        await table.step(act(bad, 1, action))
    assert (await table.step(act(good, 1))).step == 1
    assert (table.live, Closes.count, table.counts.faults) == (1, 1, 1)


async def test_the_memory_of_ended_sessions_is_bounded(table: SessionTable) -> None:
    first = (await table.reset(task())).session
    table.close(first)
    for _ in range(REMEMBERED):
        table.close((await table.reset(task())).session)
    with pytest.raises(SessionUnknown) as caught:
        await table.step(act(first, 1))
    assert caught.value.ending is None


async def test_shutdown_closes_every_session_once(table: SessionTable) -> None:
    for _ in range(3):
        await table.reset(task())
    table.shutdown()
    table.shutdown()
    assert (table.live, Closes.count) == (0, 3)
    with pytest.raises(Busy):
        await table.reset(task())


async def test_ids_are_not_guessable(table: SessionTable) -> None:
    ids = {(await table.reset(task())).session for _ in range(4)}
    assert len(ids) == 4
    assert all(len(session) >= 22 for session in ids)


async def entered() -> None:
    assert await asyncio.to_thread(Gated.entered.wait, 30)


async def test_a_concurrent_repeat_waits_for_the_same_answer(gated: SessionTable) -> None:
    session = (await gated.reset(task())).session
    calls = [asyncio.create_task(gated.step(act(session, 1))) for _ in range(3)]
    await entered()
    with pytest.raises(Conflict, match="still being taken"):
        await gated.step(act(session, 2))
    Gated.gate.set()
    first, *others = await asyncio.gather(*calls)
    assert all(other == first for other in others)
    assert gated.counts.steps == 1


async def test_a_step_outlives_the_caller_that_left(gated: SessionTable) -> None:
    session = (await gated.reset(task())).session
    call = asyncio.create_task(gated.step(act(session, 1)))
    await entered()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    Gated.gate.set()
    assert (await gated.step(act(session, 1))).observation.startswith("The count is 1")
    assert gated.counts.steps == 1


async def test_closing_during_a_step_closes_the_environment_after_it(
    gated: SessionTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real_step = Gated.step

    def step(self: Gated, action: str) -> Observation:
        observation = real_step(self, action)
        order.append("stepped")
        return observation

    closed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def close(self: Environment) -> None:
        order.append("closed")
        loop.call_soon_threadsafe(closed.set)

    monkeypatch.setattr(Gated, "step", step)
    monkeypatch.setattr(Gated, "close", close)
    session = (await gated.reset(task())).session
    call = asyncio.create_task(gated.step(act(session, 1)))
    await entered()
    gated.close(session)
    assert gated.live == 0
    Gated.gate.set()
    assert (await call).step == 1
    await asyncio.wait_for(closed.wait(), 30)
    assert order == ["stepped", "closed"]


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("traced")
async def test_a_thousand_sessions_cost_little_memory() -> None:
    table = SessionTable(Counting)
    before = tracemalloc.get_traced_memory()[0]
    for index in range(1000):
        await table.step(act((await table.reset(task(index % 50))).session, 1))
    per_session = (tracemalloc.get_traced_memory()[0] - before) / 1000
    assert per_session < 2048
