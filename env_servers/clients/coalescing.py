"""Concurrent steps travel in one request.

Invariants
- A step waits for at most the batches in flight: nothing is held back to fill a batch.
- At most `IN_FLIGHT` batches are in flight. None has more than `MOST_STEPS` steps, or grows once it has `MOST_BYTES`.
- Each step gets its own result or error; one step's error does not affect the others of its batch.

Example, with `IN_FLIGHT` 2 and steps a to f::

    a is asked for   -> batch 1 [a] is sent at the end of this turn of the event loop
    b, c             -> batch 2 [b, c]
    d, e             -> both slots are taken: d and e wait
    f                -> f waits too
    batch 1 returns  -> a has its result; batch 3 [d, e, f] is sent

Under load batches grow by themselves: the slower the server, the more steps wait, the larger the next batch.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from env_servers.clients.interface import EnvironmentUnavailableError
from env_servers.protocol import Problem, StepResult

IN_FLIGHT = 2
MOST_STEPS = 64
MOST_BYTES = 256 * 1024

Answer = StepResult | Problem | EnvironmentUnavailableError
"""What became of one step of a batch. An error is raised to whoever asked for the step."""
Send = Callable[[Sequence[bytes]], Awaitable[Sequence[Answer]]]


class Coalescer:
    """Collects encoded steps into batches.

    Args:
        send: sends a batch of encoded steps and returns one answer for each, in order. Its errors are raised to all
            steps of the batch.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._waiting: deque[tuple[bytes, asyncio.Future[StepResult | Problem]]] = deque()
        self._in_flight: set[asyncio.Task[None]] = set()
        self._scheduled = False

    async def step(self, encoded: bytes) -> StepResult | Problem:
        """The answer to one step. Raises what `send` raises for it."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[StepResult | Problem] = loop.create_future()
        self._waiting.append((encoded, answer))
        self._schedule(loop)
        return await answer

    async def close(self) -> None:
        """Cancel the steps that wait or are in flight."""
        for _, answer in self._waiting:
            answer.cancel()
        self._waiting.clear()
        for task in list(self._in_flight):
            task.cancel()
        await asyncio.gather(*self._in_flight, return_exceptions=True)

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        # call_soon: all steps that are asked for in this turn of the event loop travel together.
        if not self._scheduled and self._waiting and len(self._in_flight) < IN_FLIGHT:
            self._scheduled = True
            loop.call_soon(self._dispatch, loop)

    def _dispatch(self, loop: asyncio.AbstractEventLoop) -> None:
        self._scheduled = False
        batch = self._take()
        if batch:
            task = loop.create_task(self._deliver(batch))
            self._in_flight.add(task)
            task.add_done_callback(self._settle)

    def _settle(self, task: asyncio.Task[None]) -> None:
        self._in_flight.discard(task)
        self._schedule(task.get_loop())

    def _take(self) -> list[tuple[bytes, asyncio.Future[StepResult | Problem]]]:
        """The next batch, without the steps that were cancelled meanwhile."""
        batch: list[tuple[bytes, asyncio.Future[StepResult | Problem]]] = []
        size = 0
        while self._waiting and len(batch) < MOST_STEPS and (not batch or size < MOST_BYTES):
            step = self._waiting.popleft()
            if not step[1].done():
                batch.append(step)
                size += len(step[0])
        return batch

    async def _deliver(self, batch: Sequence[tuple[bytes, asyncio.Future[StepResult | Problem]]]) -> None:
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
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
