"""Blocking calls of an environment, in threads that are bounded in number and in time.

Invariants
- At most `threads` calls run at a time. A call that takes longer than `limit_s` is abandoned and fails alone: its
  thread ends whenever the call does, and its slot is free for another call.
- At most `threads` abandoned calls free their slot in this way; further ones keep it. So there are at most
  `2 * threads` threads.
- No thread keeps the process from exiting.

Example, with `threads` 2: calls a and b hang and are abandoned, which frees both slots. Calls c and d run and hang too;
now the two slots stay taken (`exhausted`), and a further call raises `NoThread`, until any of the four returns.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class CallTimeout(Exception):
    """The call did not return in time. It may still run."""


class NoThread(Exception):
    """No thread was free in time; the function was not called."""


class BlockingCalls:
    """The threads for the blocking calls of one event loop.

    Args:
        name: name of the threads.
        threads: maximum number of concurrent calls.
        limit_s: time limit of the wait for a thread, and of a call.

    Attributes:
        given_up: abandoned calls that still run.
        limit_s: the time limit.
    """

    def __init__(self, name: str, threads: int, limit_s: float) -> None:
        self.given_up = 0
        self.limit_s = limit_s
        self._name = name
        self._threads = threads
        self._free = asyncio.Semaphore(threads)

    @property
    def exhausted(self) -> bool:
        """Whether `threads` or more abandoned calls still run: nothing new should start."""
        return self.given_up >= self._threads

    async def run(self, function: Callable[[], T], afterwards: Callable[[T | None], None] = lambda _: None) -> T:
        """Call the function in a thread; return what it returns and raise what it raises.

        Args:
            function: the function.
            afterwards: called in the same thread once an abandoned call returns: with its result, or with None if it
                raised.

        Raises:
            CallTimeout: the call took longer than `limit_s`.
            NoThread: no thread was free; the function was not called.
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
        """Free the call's slot. Returns whether the call still runs and is abandoned."""
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
    """One call in a thread of its own. Created on the event loop.

    Attributes:
        outcome: done once the function has returned, unless the call was abandoned before.
        keeps_place: whether the abandoned call keeps its slot until it returns.
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
        """Abandon the call. Returns False if the function has already returned; then its outcome stands."""
        with self._lock:
            self._given_up = not self._over
            return self._given_up

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # it returned without an error

    def _run(self) -> None:
        try:
            self._value = self._function()
        except Exception as error:
            self._error = error
        except BaseException as error:  # such as SystemExit, which must not end the server
            self._error = RuntimeError(f"{type(error).__name__}: {error}")
        with self._lock:
            self._over = True
        if self._given_up:
            self._afterwards(self._value)
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._settle)

    def _settle(self) -> None:
        if self._given_up:
            self._ended(self)
        elif not self.outcome.done():
            self.outcome.set_result(None)
