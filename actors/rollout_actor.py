"""Rollout actor: leases tickets and plays them, many episodes at once, until it is drained or loses what it needs.

Invariants
- A leased ticket is either stored, failed, released or abandoned (its lease was lost). An actor that ends, for whatever
  reason, releases the tickets it still holds.
- A finished episode makes room for the next ticket at once.
- Where learner and actors take turns on a card, nothing is leased or begun while the engine sleeps.
- An error of an episode fails its ticket; an error of the engine, the weights or Redis ends the actor. If no server of
  an environment is usable, its tickets go back without a failed attempt, after a pause.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping

from actors.card_turns import EpisodeLimits, Turns
from actors.engine.interface import InferenceEngine, Sampler
from actors.episode import EpisodeFailed
from actors.players import Player, TicketReturned
from actors.weights import LockedSampler, WeightFollower
from env_servers.client import EnvironmentClient, EnvironmentUnavailableError, RequestRejected
from services.backoff import Patience
from services.buffer import Buffer, Stored
from services.codec import CodecError
from services.config.tree import Config
from services.errors import AnchorageError
from services.schemas import Ticket
from services.weights import WeightChannel

logger = logging.getLogger(__name__)

POLL_S = 0.2
LOOKS = Patience(POLL_S, 2.0)
"""How often to ask for tickets while there are none, by the time since there were some."""
HEARTBEAT_S = 1.0
HEARTBEAT_TTL_S = 10.0
FAILURE_DELAY_S = 0.5
UNAVAILABLE_DELAY_S = 5.0
CLOSING_S = 5.0


class Rollout:
    """One rollout actor. Call `run` once; `drain` may be called at any time from the same event loop.

    Args:
        name: of the actor, in leases and heartbeats.
        config: of the run.
        engine: samples responses; started and stopped here.
        environments: a client for each environment, by name; closed here.
        player: makes what plays the tickets, from what samples responses.
        buffer: the run's.
        channel: of the run's policy versions.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        *,
        engine: InferenceEngine,
        environments: Mapping[str, EnvironmentClient],
        player: Callable[[Sampler], Player],
        buffer: Buffer,
        channel: WeightChannel,
    ) -> None:
        self.name = name
        self._config = config
        self._engine = engine
        self._environments = environments
        self._buffer = buffer
        self._weights = WeightFollower(channel, engine, config.weights)
        self._player = player(LockedSampler(engine, self._weights.responses))
        self._limits = EpisodeLimits()
        self._episodes: dict[str, asyncio.Task[None]] = {}
        self._awaiting_weights: set[str] = set()
        self._settling: set[str] = set()
        self._room = asyncio.Event()
        self._turns = self._own_turns()
        self._ended = asyncio.Event()
        self._error: AnchorageError | None = None
        self._stopping = False
        self._draining = False
        self._releasing = asyncio.Lock()
        self._state = "starting"
        self._outcomes = {"stored": 0, "failed": 0, "returned": 0, "abandoned": 0}
        self._tokens_per_s = 0.0

    async def run(self) -> None:
        """Play until drained.

        Raises:
            ModelUnavailable, EngineFailed: the engine cannot start, stopped, or cannot load a policy version.
            RedisUnavailable: the buffer stayed unavailable.
        """
        endless = (self._follow_weights(), self._lease(), self._renew(), self._heartbeat(), self._measure())
        loops = [asyncio.create_task(loop) for loop in endless]
        ended = asyncio.create_task(self._ended.wait())
        try:
            await asyncio.wait([ended, *loops], return_when=asyncio.FIRST_COMPLETED)
            for loop in loops:
                if loop.done():
                    loop.result()
            if self._error is not None:
                raise self._error
        finally:
            await self._end([ended, *loops])

    async def drain(self) -> None:
        """Release every ticket at once and let `run` end."""
        self._state = "draining"
        self._draining = True
        await self._release_all()
        self._ended.set()

    def status(self) -> dict[str, object]:
        """State for heartbeats, as plain JSON data."""
        stats = self._engine.stats()
        doing = self._state if self._turns is None or self._draining else self._turns.phase
        return {
            "state": "stopping" if self._stopping else doing,
            "version": self._engine.version,
            "episodes": len(self._episodes),
            "tokens_per_s": round(self._tokens_per_s, 1),
            "response_tokens": stats.response_tokens,
            "updates": stats.updates,
            "update_seconds": round(stats.update_seconds, 3),
            "kv_use": None if stats.kv_use is None else round(stats.kv_use, 4),
            **self._outcomes,
            **self._player.status(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }

    async def _end(self, tasks: list[asyncio.Task[object]]) -> None:
        """Cancel the loops, release all tickets, stop the engine and close the clients."""
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await self._release_all()
        except AnchorageError as error:
            logger.warning("cannot release tickets, their leases will expire: %s", error)
        await self._player.close()
        try:
            async with asyncio.timeout(CLOSING_S):
                await self._engine.stop()
        except TimeoutError:
            logger.warning("engine not stopped within %g s; it ends with this process", CLOSING_S)
        else:
            await self._leave_card()
        for client in self._environments.values():
            await client.close()

    async def _release_all(self) -> None:
        # Ending the actor waits here for a release in progress, because the buffer is closed afterwards.
        async with self._releasing:
            held, self._episodes = self._episodes, {}
            for task in held.values():
                task.cancel()
            if held:
                await asyncio.to_thread(self._buffer.release, self.name, list(held))
                await asyncio.wait(held.values(), timeout=CLOSING_S)

    def _own_turns(self) -> Turns | None:
        """This actor's turns on a card that it shares with the learner; None if its engine has one all the time."""
        rollout = self._config.rollout
        if rollout.share_gpus != "turns":
            return None
        parts = self._engine, self._weights, self._limits
        return Turns(self.name, self._buffer.card, *parts, rollout.lease_s, on_wake=self._room.set)

    async def _leave_card(self) -> None:
        if self._turns is not None:
            try:
                await self._turns.leave()
            except AnchorageError as error:
                logger.warning("card not given back, its lease will expire: %s", error)

    async def _follow_weights(self) -> None:
        """Start player and engine, load the first version, then follow newer ones."""
        await self._player.start()
        if self._turns is not None:
            await self._turns.run()
            return
        await self._engine.start()
        self._state = "waiting for weights"
        await self._weights.first()
        self._state = "playing"
        await self._weights.follow()

    async def _lease(self) -> None:
        """Keep as many episodes in flight as configured."""
        leased_at = time.monotonic()
        while True:
            if not self._weights.awake.is_set():
                await self._weights.awake.wait()
                leased_at = time.monotonic()
            self._room.clear()
            room = self._config.rollout.episodes_in_flight - len(self._episodes)
            closing = self._stopping or self._draining or self._ended.is_set()
            may_begin = not closing and self._weights.episodes.open
            room = self._player.room(room) if room > 0 and may_begin else 0
            tickets = await self._lease_tickets(room) if room > 0 else []
            if tickets:
                leased_at = time.monotonic()
                tickets = await self._catch_up(tickets)
            for ticket in tickets:
                self._episodes[ticket.id] = asyncio.create_task(self._play(ticket))
            if not tickets:
                # Not asyncio.wait_for: in Python 3.11 it loses a cancellation that arrives with the event.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOKS.delay(time.monotonic() - leased_at)):
                        await self._room.wait()

    async def _catch_up(self, tickets: list[Ticket]) -> list[Ticket]:
        """Load the version announced before the tickets were leased. Returns the tickets whose lease is still held."""
        # `_renew` renews their leases too, although they are not being played yet: loading may take minutes.
        self._awaiting_weights = {ticket.id for ticket in tickets}
        try:
            await self._weights.catch_up()
        except BaseException:
            await asyncio.to_thread(self._buffer.release, self.name, [ticket.id for ticket in tickets])
            raise
        held, self._awaiting_weights = self._awaiting_weights, set()
        return [ticket for ticket in tickets if ticket.id in held]

    async def _lease_tickets(self, room: int) -> list[Ticket]:
        """Lease up to `room` tickets. If cancelled meanwhile, waits for the call and releases what it leased."""
        lease_s = self._config.rollout.lease_s
        call = asyncio.create_task(asyncio.to_thread(self._buffer.lease, self.name, room, lease_s))
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            await asyncio.to_thread(self._buffer.release, self.name, [ticket.id for ticket in await call])
            raise

    async def _renew(self) -> None:
        """Renew the leases of all tickets held; abandon those that were lost."""
        lease_s = self._config.rollout.lease_s
        while True:
            await asyncio.sleep(lease_s / 3)
            held = [*self._episodes, *self._awaiting_weights]
            for ticket in await asyncio.to_thread(self._buffer.renew, self.name, held, lease_s):
                self._abandon(ticket)

    def _abandon(self, ticket: str) -> None:
        if ticket in self._settling:  # storing it may be what ended the lease; if not, the first write wins
            return
        task = self._episodes.pop(ticket, None)
        if task is None and ticket not in self._awaiting_weights:
            return
        logger.warning("ticket %s: lease lost, abandoning its episode", ticket)
        self._outcomes["abandoned"] += 1
        self._awaiting_weights.discard(ticket)
        if task is not None:
            task.cancel()
        self._room.set()

    async def _heartbeat(self) -> None:
        """Write heartbeats; release all tickets when the run is stopping."""
        while True:
            state = await asyncio.to_thread(self._buffer.heartbeat, self.name, self.status(), HEARTBEAT_TTL_S)
            self._stopping = state == "stopping"
            if self._stopping and self._episodes:
                logger.info("run is stopping, releasing %d tickets", len(self._episodes))
                await self._release_all()
            await asyncio.sleep(HEARTBEAT_S)

    async def _measure(self) -> None:
        """Measure the response tokens per second, every few seconds."""
        while True:
            began, before = time.monotonic(), self._engine.stats().response_tokens
            await asyncio.sleep(5 * HEARTBEAT_S)
            self._tokens_per_s = (self._engine.stats().response_tokens - before) / (time.monotonic() - began)

    async def _play(self, ticket: Ticket) -> None:
        """Play and settle one ticket. Whoever cancels this task must settle its ticket."""
        try:
            outcome = await self._settle(ticket)
        except AnchorageError as error:
            self._error = self._error or error
            self._ended.set()
            return
        finally:
            self._settling.discard(ticket.id)
        self._outcomes[outcome] += 1
        # A ticket that went back into the queue may have been leased again, even by this actor.
        if self._episodes.get(ticket.id) is asyncio.current_task():
            del self._episodes[ticket.id]
        self._room.set()

    async def _settle(self, ticket: Ticket) -> str:
        """Play a ticket, then store or fail it, or give it back. Returns the outcome, a key of `_outcomes`.

        Raises:
            AnchorageError: from the engine, the weights or Redis; the ticket is not settled.
        """
        limit = self._player.limit_s
        try:
            try:
                async with self._weights.episodes.shared(), self._limits.limit(limit):
                    trajectory = await self._player.play(ticket)
            finally:
                self._settling.add(ticket.id)
            stored = await asyncio.to_thread(self._buffer.store, trajectory)
        except AnchorageError:
            raise
        except TimeoutError:
            reason = f"the episode took longer than {limit:g} s"
        except (EnvironmentUnavailableError, TicketReturned) as error:
            return await self._return(ticket, error)
        except (EpisodeFailed, RequestRejected, CodecError) as error:
            reason = f"{ticket.task.env}: {error}"
        except Exception as error:
            logger.exception("ticket %s: unexpected error", ticket.id)
            reason = f"{type(error).__name__}: {error}"
        else:
            if stored in (Stored.DUPLICATE, Stored.UNKNOWN):
                logger.info("ticket %s: trajectory not stored: %s", ticket.id, stored.value)
            return "stored"
        logger.warning("ticket %s failed: %s", ticket.id, reason)
        if await asyncio.to_thread(self._buffer.fail, self.name, ticket.id, reason):
            logger.warning("group %s/%d cancelled", ticket.stream, ticket.group)
        await asyncio.sleep(FAILURE_DELAY_S)
        return "failed"

    async def _return(self, ticket: Ticket, error: Exception) -> str:
        """Release a ticket after a pause, in which its place stays taken: an unavailable server is not flooded."""
        logger.warning("ticket %s: releasing it in %g s: %s", ticket.id, UNAVAILABLE_DELAY_S, error)
        await asyncio.sleep(UNAVAILABLE_DELAY_S)
        await asyncio.to_thread(self._buffer.release, self.name, [ticket.id])
        return "returned"
