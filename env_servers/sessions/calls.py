"""An environment's blocking calls: in threads of their own, bounded in number and in time.

Invariants
- At most `threads` calls are waited for. One that takes longer than `limit_s` is given up and fails alone: its thread
  ends whenever the call does, and another takes its place.
- At most `threads` given-up calls are replaced so; further ones keep their place. So threads are bounded.
- No thread keeps the process from ending.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class CallTimeout(Exception):
    """The call did not return in time. It may still run; nobody waits for it."""


class NoThread(Exception):
    """No thread was free in time. The call was not made."""


class BlockingCalls:
    """The threads of one event loop's blocking calls.

    Args:
        name: of the threads.
        threads: most calls that are waited for at the same time.
        limit_s: longest wait for a thread, and longest call.

    Attributes:
        given_up: calls that nobody waits for any more and that still run.
    """

    def __init__(self, name: str, threads: int, limit_s: float) -> None:
        self.given_up = 0
        self.limit_s = limit_s
        self._name = name
        self._threads = threads
        self._free = asyncio.Semaphore(threads)

    @property
    def exhausted(self) -> bool:
        """Whether as many given-up calls still run as are replaced: nothing new should be begun."""
        return self.given_up >= self._threads

    async def run(self, function: Callable[[], T], afterwards: Callable[[T | None], None] = lambda _: None) -> T:
        """What the function returns or raises.

        Args:
            function: called in a thread.
            afterwards: called there too, once a given-up call has ended: with its result, None where it raised.

        Raises:
            CallTimeout: it took too long. NoThread: it was not called.
        """
        try:
            async with asyncio.timeout(self.limit_s):
                await self._free.acquire()
        except TimeoutError as error:
            raise NoThread(f"no thread was free within {self.limit_s:g} s") from error
        call = _Call(function, afterwards, self._ended)
        try:
            call.start(self._name)
        except RuntimeError as error:
            self._free.release()
            raise NoThread(f"no thread can be started: {error}") from error
        try:
            await asyncio.wait([call.outcome], timeout=self.limit_s)
        finally:
            left = self._leave(call)
        if left:
            raise CallTimeout(f"no answer within {self.limit_s:g} s")
        return call.result()

    def _leave(self, call: _Call[T]) -> bool:
        """Free the call's place; whether the call still runs, and is given up."""
        left = call.give_up()
        self.given_up += left
        call.keeps_place = left and self.given_up > self._threads
        if not call.keeps_place:
            self._free.release()
        return left

    def _ended(self, call: _Call[T]) -> None:
        self.given_up -= 1
        if call.keeps_place:
            self._free.release()


class _Call(Generic[T]):
    """One call in a thread of its own. Made on the event loop.

    Attributes:
        outcome: done once the function has ended, unless the call was given up before.
        keeps_place: whether no other call has taken its place.
    """

    def __init__(
        self, function: Callable[[], T], afterwards: Callable[[T | None], None], ended: Callable[[_Call[T]], None]
    ) -> None:
        self._function = function
        self._afterwards = afterwards
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._value: T | None = None
        self._error: Exception | None = None
        self._over = False
        self._given_up = False
        self.outcome: asyncio.Future[None] = self._loop.create_future()
        self.keeps_place = False

    def start(self, name: str) -> None:
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def give_up(self) -> bool:
        """Wait no longer. False where the function has ended already and its outcome stands."""
        with self._lock:
            self._given_up = not self._over
            return self._given_up

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # it has ended without an error

    def _run(self) -> None:
        try:
            self._value = self._function()
        except Exception as error:
            self._error = error
        except BaseException as error:  # such as SystemExit: not the server's
            self._error = RuntimeError(f"{type(error).__name__}: {error}")
        with self._lock:
            self._over = True
        if self._given_up:
            self._afterwards(self._value)
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._settle)

    def _settle(self) -> None:
        if self._given_up:
            self._ended(self)
        elif not self.outcome.done():
            self.outcome.set_result(None)
