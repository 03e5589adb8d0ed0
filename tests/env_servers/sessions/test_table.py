"""The session table: step numbers, endings, limits, blocking environments."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Iterator

import pytest

from env_servers.environment import BrokenTask, Environment, Observation, UnknownTask
from env_servers.protocol import ResetRequest, StepRequest
from env_servers.sessions.table import (
    REMEMBERED,
    AnchorUnsupported,
    Busy,
    Conflict,
    EnvironmentFault,
    SessionTable,
    SessionUnknown,
)
from tests.env_servers.counting import Counting, Gated, Hanging, Stateless, Unspeakable


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
    await table.shutdown()


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


@pytest.mark.parametrize("action", ["up", "choose", "mumble"])
async def test_what_json_cannot_hold_loses_its_session_only(action: str) -> None:
    table = SessionTable(Unspeakable)
    good, bad = [(await table.reset(task())).session for _ in range(2)]
    with pytest.raises(EnvironmentFault, match="failed at step 1"):
        await table.step(act(bad, 1, action))
    with pytest.raises(SessionUnknown, match="failed"):
        await table.step(act(bad, 1, action))
    assert (await table.step(act(good, 1, "down"))).step == 1
    with pytest.raises(EnvironmentFault, match="failed at reset of broken/0"):
        await table.reset(ResetRequest(split="broken", index=0))
    assert table.live == 1


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
    await table.shutdown()
    await table.shutdown()
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
async def hanging() -> AsyncIterator[SessionTable]:
    Hanging.gate.clear()
    while Hanging.all_closed.acquire(blocking=False):
        pass
    table = SessionTable(Hanging, threads=1, call_seconds=0.5)
    yield table
    Hanging.gate.set()
    await table.shutdown()


async def closed() -> None:
    assert await asyncio.to_thread(Hanging.all_closed.acquire, timeout=30)


async def test_a_step_that_hangs_fails_its_session_and_the_others_go_on(hanging: SessionTable) -> None:
    stuck, other = [(await hanging.reset(task())).session for _ in range(2)]
    with pytest.raises(EnvironmentFault, match=r"failed at step 1: no answer within 0\.5 s"):
        await hanging.step(act(stuck, 1, "hang"))
    with pytest.raises(SessionUnknown, match="failed"):
        await hanging.step(act(stuck, 1, "hang"))
    assert (await hanging.step(act(other, 1))).step == 1
    assert (hanging.live, hanging.hung, hanging.counts.faults) == (1, 1, 1)
    with pytest.raises(Busy, match="1 calls of the environment hang"):
        await hanging.reset(task())
    Hanging.gate.set()
    await closed()
    async with asyncio.timeout(30):
        while hanging.hung:  # noqa: ASYNC110 - the last word of a thread is its own
            await asyncio.sleep(0)
    await hanging.reset(task())


async def test_a_session_closed_while_its_step_hangs_is_closed_by_the_step(hanging: SessionTable) -> None:
    stuck = (await hanging.reset(task())).session
    step = asyncio.create_task(hanging.step(act(stuck, 1, "hang")))
    await asyncio.sleep(0)
    hanging.close(stuck)
    with pytest.raises(EnvironmentFault, match="no answer"):
        await step
    Hanging.gate.set()
    await closed()


async def test_a_reset_that_hangs_leaves_nothing_behind(hanging: SessionTable) -> None:
    with pytest.raises(EnvironmentFault, match="failed at reset of train/9: no answer"):
        await hanging.reset(task(9))
    assert hanging.live == 0
    Hanging.gate.set()
    await closed()


async def test_a_step_for_which_no_thread_is_free_was_not_taken(hanging: SessionTable) -> None:
    *stuck, waiting = [(await hanging.reset(task())).session for _ in range(3)]
    for session in stuck:
        with pytest.raises(EnvironmentFault):
            await hanging.step(act(session, 1, "hang"))
    with pytest.raises(Busy, match="no thread was free"):
        await hanging.step(act(waiting, 1))
    Hanging.gate.set()
    assert (await hanging.step(act(waiting, 1))).observation.startswith("The count is 1")


async def test_shutdown_waits_for_blocking_environments_to_close() -> None:
    Hanging.gate.set()
    while Hanging.all_closed.acquire(blocking=False):
        pass
    table = SessionTable(Hanging, threads=2)
    for _ in range(5):
        await table.reset(task())
    await table.shutdown()
    assert [Hanging.all_closed.acquire(blocking=False) for _ in range(6)] == [True] * 5 + [False]


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
