"""A call that hangs on the event loop is reported while it hangs, and when it returns."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest

from env_servers.environment import Observation
from env_servers.protocol import ResetRequest, StepRequest
from env_servers.sessions.table import SessionTable
from env_servers.sessions.watch import LoopCall, LoopWatch
from tests.env_servers.counting import Counting, Gated
from tests.waiting import until


class Hung(Counting):
    """Not blocking, and yet a step waits until the test opens the gate."""

    name = "hung"
    gate: ClassVar[threading.Event]

    def step(self, action: str) -> Observation:
        assert self.gate.wait(60)
        return super().step(action)


def play(table: SessionTable) -> None:
    async def one_step() -> None:
        seen = await table.reset(ResetRequest(split="train", index=0))
        await table.step(StepRequest(session=seen.session, step=1, action="up"))

    asyncio.run(one_step())


def test_a_hang_is_told_while_it_lasts_and_when_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    Hung.gate = threading.Event()
    table = SessionTable(Hung)
    with LoopWatch(table.on_loop, blocks_s=0.05), ThreadPoolExecutor(1) as other:
        playing = other.submit(play, table)
        try:
            until(lambda: caplog.records)
        finally:
            Hung.gate.set()
        playing.result(60)
    told, ended = (record.getMessage() for record in caplog.records)
    assert told.startswith("environment hung blocks the event loop: a step has not returned for 0.")
    assert "set blocking = True in its class" in told
    assert ended.startswith("environment hung no longer blocks the event loop: a step took ")


def test_a_call_in_a_thread_is_none_of_its_business() -> None:
    Gated.gate.clear()
    Gated.entered.clear()
    table = SessionTable(Gated)
    with ThreadPoolExecutor(1) as other:
        playing = other.submit(play, table)
        assert Gated.entered.wait(60)
        assert not table.on_loop.report(0.0)
        Gated.gate.set()
        playing.result(60)


def test_each_call_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    call = LoopCall("one")
    for _ in range(2):
        call.begin("a reset")
        assert call.report(0.0)
        assert not call.report(0.0)
        call.end()
        assert not call.report(0.0)
    call.begin("a step")
    call.end()
    assert len(caplog.records) == 4
