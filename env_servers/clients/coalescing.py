"""Steps that are asked for at about the same time travel in one request.

Invariants
- A step waits for at most the batch that is under way: nothing is held back for company.
- At most `IN_FLIGHT` batches are under way, and none is longer than `MOST_STEPS` or, by bytes, than `MOST_BYTES`.
- Each step gets its own answer or error; what one step meets does not touch the others of its batch.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from env_servers.protocol import Problem, StepResult

IN_FLIGHT = 2
MOST_STEPS = 64
MOST_BYTES = 256 * 1024

Answer = StepResult | Problem
Send = Callable[[Sequence[bytes]], Awaitable[Sequence[Answer]]]


class Coalescer:
    """Gathers encoded steps into batches.

    Args:
        send: sends a batch of encoded steps and gives one answer for each, in order. Its errors reach all of them.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._waiting: deque[tuple[bytes, asyncio.Future[Answer]]] = deque()
        self._under_way: set[asyncio.Task[None]] = set()
        self._scheduled = False

    async def step(self, encoded: bytes) -> Answer:
        """The answer to one step."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append((encoded, answer))
        self._schedule(loop)
        return await answer

    async def close(self) -> None:
        """Give up the steps that wait or are under way."""
        for _, answer in self._waiting:
            answer.cancel()
        self._waiting.clear()
        for task in list(self._under_way):
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._scheduled and self._waiting and len(self._under_way) < IN_FLIGHT:
            self._scheduled = True
            loop.call_soon(self._dispatch, loop)

    def _dispatch(self, loop: asyncio.AbstractEventLoop) -> None:
        self._scheduled = False
        batch = self._take()
        if batch:
            task = loop.create_task(self._deliver(batch))
            self._under_way.add(task)
            task.add_done_callback(self._settle)

    def _settle(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self._schedule(task.get_loop())

    def _take(self) -> list[tuple[bytes, asyncio.Future[Answer]]]:
        batch: list[tuple[bytes, asyncio.Future[Answer]]] = []
        size = 0
        while self._waiting and len(batch) < MOST_STEPS and (not batch or size < MOST_BYTES):
            step = self._waiting.popleft()
            if not step[1].done():
                batch.append(step)
                size += len(step[0])
        return batch

    async def _deliver(self, batch: Sequence[tuple[bytes, asyncio.Future[Answer]]]) -> None:
        try:
            answers = await self._send([encoded for encoded, _ in batch])
        except BaseException as error:
            for _, future in batch:
                if not future.done():
                    if isinstance(error, asyncio.CancelledError):
                        future.cancel()
                    else:
                        future.set_exception(error)
            if not isinstance(error, Exception):
                raise
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)
