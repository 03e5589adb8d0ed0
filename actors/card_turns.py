"""An actor's turns on the card that it shares with the learner (`rollout.share_gpus: turns`).

Invariants
- The engine starts, wakes and samples only while the actor has the card (`services.buffer.card`). When the learner asks
  for the card, the engine falls asleep and the actor gives it back: requests in flight are kept, leases are renewed.
- An actor whose turn is over although it never gave the card back (it stood still for a lease) ends, with its engine.
- It asks for the card once a version is announced: before, there is nothing to play.
- Time in which the engine sleeps does not count for `rollout.episode_timeout_s`.

Example: one update with `learner.max_staleness: 0`.

    actor                              card       learner
    playing                            actor      waits for groups
    the last group is complete         actor      asks for the card
    parking: the engine sleeps         actor
    gives the card                     learner    loads its states, updates, publishes
    asks for the card                  learner    moves its states to the host, gives the card
    waking: loads the new version      actor      waits for groups
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from actors.engine.interface import EngineFailed, InferenceEngine
from actors.weights import WeightFollower
from services.buffer.card import Bid, Card, Hold, Turn

POLL_S = 0.1
RENEW_S = 0.2
"""How soon the holder learns that another one waits for the card."""


class EpisodeLimits:
    """Time limits of episodes, which stand still while the engine sleeps."""

    def __init__(self) -> None:
        self._running: dict[asyncio.Timeout, float] = {}
        self._stopped = False

    @asynccontextmanager
    async def limit(self, seconds: float) -> AsyncIterator[None]:
        """As `asyncio.timeout`."""
        async with asyncio.timeout(None if self._stopped else seconds) as timeout:
            self._running[timeout] = seconds
            try:
                yield
            finally:
                del self._running[timeout]

    def stop(self) -> None:
        """Let no time pass from now on."""
        now, self._stopped = asyncio.get_running_loop().time(), True
        for timeout in self._running:
            ends = timeout.when()
            if ends is not None and not timeout.expired():
                self._running[timeout] = max(0.0, ends - now)
                timeout.reschedule(None)

    def go_on(self) -> None:
        """Let time pass again."""
        now, self._stopped = asyncio.get_running_loop().time(), False
        for timeout, left in self._running.items():
            if timeout.when() is None and not timeout.expired():
                timeout.reschedule(now + left)


class Turns:
    """The turns of one actor. Call `run` once, and `leave` when the engine has stopped.

    Args:
        name: of the actor.
        card: of the run.
        engine: started here.
        weights: loads versions into it.
        limits: of the episodes.
        lease_s: of a turn, in seconds.
        on_wake: called when the engine may sample again.

    Attributes:
        phase: what the actor is doing, for heartbeats and in the card's key: `waiting for weights`, `asleep`,
            `starting`, `waking`, `playing`, `parking`.
    """

    def __init__(
        self,
        name: str,
        card: Card,
        engine: InferenceEngine,
        weights: WeightFollower,
        limits: EpisodeLimits,
        lease_s: float,
        on_wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._name = name
        self._card = card
        self._engine = engine
        self._weights = weights
        self._limits = limits
        self._lease_s = lease_s
        self._on_wake = on_wake
        self._turn: Turn | None = None
        self._wanted = asyncio.Event()
        self.phase = "waiting for weights"

    async def run(self) -> None:
        """Take turns. Ends only by an error.

        Raises:
            ModelUnavailable, EngineFailed: the engine cannot start, sleep or wake, or the actor has lost the card.
            RedisUnavailable: Redis stayed unavailable.
        """
        taking, renewing = asyncio.create_task(self._take_turns()), asyncio.create_task(self._renew())
        try:
            done, _ = await asyncio.wait([taking, renewing], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (taking, renewing):
                task.cancel()
            await asyncio.gather(taking, renewing, return_exceptions=True)

    async def leave(self) -> None:
        """Give the card back, once the engine has stopped."""
        turn, self._turn = self._turn, None
        if turn is not None:
            await asyncio.to_thread(self._card.give, turn)

    async def _take_turns(self) -> None:
        while not await self._weights.announced():  # noqa: ASYNC110 - the channel tells no one
            await asyncio.sleep(POLL_S)
        await self._take("starting")
        await self._engine.start()
        asleep = False
        while True:
            await self._enter("waking")
            while not await self._weights.wake():  # the learner has to publish again what its channel has lost
                await self._wanted.wait()
                await self._hand_over(asleep=asleep)
                asleep = True
            await self._enter("playing")
            self._limits.go_on()
            self._on_wake()
            await self._wanted.wait()
            await self._enter("parking")
            await self._weights.sleep()
            self._limits.stop()
            asleep = True
            await self._hand_over(asleep=True)

    async def _hand_over(self, *, asleep: bool) -> None:
        """Let the learner have the card, and wait for the next turn."""
        if not asleep:
            await self._weights.put_to_sleep()
        self.phase = "asleep"
        await self.leave()
        await self._take("waking")

    async def _take(self, phase: str) -> None:
        bid = Bid(self._name)
        while (turn := await self._bid(bid)) is None:  # noqa: ASYNC110 - Redis tells no one
            await asyncio.sleep(POLL_S)
        self._wanted.clear()
        self._turn = turn
        await self._enter(phase)

    async def _bid(self, bid: Bid) -> Turn | None:
        """Ask for the card once. If cancelled meanwhile, waits for the reply and gives back what was granted."""
        call = asyncio.create_task(asyncio.to_thread(self._card.take, bid, self._lease_s))
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            if (turn := await call) is not None:
                await asyncio.to_thread(self._card.give, turn)
            raise

    async def _enter(self, phase: str) -> None:
        self.phase = phase
        await self._show()

    async def _renew(self) -> None:
        """Renew the turn that is under way."""
        while True:
            await asyncio.sleep(RENEW_S)
            await self._show()

    async def _show(self) -> None:
        """Renew the turn and say what it is used for. Raises EngineFailed if it is over."""
        turn = self._turn
        if turn is None:
            return
        hold = await asyncio.to_thread(self._card.renew, turn, self._lease_s, self.phase)
        if turn is not self._turn:
            return  # given back meanwhile
        if hold is Hold.OVER:
            self._turn = None
            raise EngineFailed(f"another one has the card: no renewal within {self._lease_s:g} s (rollout.lease_s)")
        if hold is Hold.WANTED:
            self._wanted.set()
