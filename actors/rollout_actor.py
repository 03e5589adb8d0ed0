"""Leases tickets and plays them, many episodes at once, until it is drained or something it needs is gone.

Invariants
- A leased ticket is stored, failed, released or abandoned (its lease was lost), and exactly one of them; when the actor
  ends, whatever the reason, the tickets it still holds are released.
- An ended episode makes room for the next ticket at once.
- An episode's own trouble fails its ticket; trouble of the engine, the weights or Redis ends the actor with that error.
  An environment none of whose servers can be used costs its tickets no attempt: they go back, with a pause.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Mapping

from actors.engine.interface import InferenceEngine
from actors.episode import EpisodeFailed, action_form, play
from actors.prompts import PromptBuilder
from actors.weights import GatedSampler, WeightFollower
from env_servers.client import EnvironmentClient, EnvironmentUnavailableError, RequestRejected
from env_servers.protocol import ActionForm
from services.buffer import Buffer, Stored
from services.codec import CodecError
from services.config.tree import Config
from services.errors import AnchorageError
from services.schemas import Ticket, Trajectory
from services.weights import WeightChannel

logger = logging.getLogger(__name__)

POLL_S = 0.2
HEARTBEAT_S = 1.0
HEARTBEAT_TTL_S = 10.0
FAILURE_DELAY_S = 0.5
UNAVAILABLE_DELAY_S = 5.0
CLOSING_S = 5.0


class Rollout:
    """One rollout actor. `run` once; `drain` may be called at any time from the same event loop.

    `environments`: a client for each environment, by name.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        *,
        engine: InferenceEngine,
        environments: Mapping[str, EnvironmentClient],
        prompts: PromptBuilder,
        buffer: Buffer,
        channel: WeightChannel,
    ) -> None:
        self.name = name
        self._config = config
        self._engine = engine
        self._environments = environments
        self._forms: dict[str, ActionForm] = {}
        self._alone = {name: asyncio.Lock() for name in environments}
        self._prompts = prompts
        self._buffer = buffer
        self._weights = WeightFollower(channel, engine, config.weights)
        self._sampler = GatedSampler(engine, self._weights.responses)
        self._episodes: dict[str, asyncio.Task[None]] = {}
        self._coming: set[str] = set()
        self._settling: set[str] = set()
        self._ready = asyncio.Event()
        self._room = asyncio.Event()
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
            RedisUnavailable: the buffer stayed away.
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
        """Give every ticket back at once and let `run` end."""
        self._state = "draining"
        self._draining = True
        await self._release_all()
        self._ended.set()

    def status(self) -> dict[str, object]:
        """JSON-able facts for heartbeats."""
        stats = self._engine.stats()
        return {
            "state": "stopping" if self._stopping else self._state,
            "version": self._engine.version,
            "episodes": len(self._episodes),
            "tokens_per_s": round(self._tokens_per_s, 1),
            "response_tokens": stats.response_tokens,
            "updates": stats.updates,
            "update_seconds": round(stats.update_seconds, 3),
            "kv_use": None if stats.kv_use is None else round(stats.kv_use, 4),
            **self._outcomes,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }

    async def _end(self, tasks: list[asyncio.Task[object]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await self._release_all()
        except AnchorageError as error:
            logger.warning("the tickets cannot be given back, their leases will run out: %s", error)
        try:
            async with asyncio.timeout(CLOSING_S):
                await self._engine.stop()
        except TimeoutError:
            logger.warning("the engine does not stop; it ends with its process")
        for client in self._environments.values():
            await client.close()

    async def _release_all(self) -> None:
        # Who ends the actor waits here for whoever is giving tickets back already: then the buffer is closed.
        async with self._releasing:
            held, self._episodes = self._episodes, {}
            for task in held.values():
                task.cancel()
            if held:
                await asyncio.to_thread(self._buffer.release, self.name, list(held))
                await asyncio.wait(held.values(), timeout=CLOSING_S)

    async def _follow_weights(self) -> None:
        await self._engine.start()
        self._state = "waiting for weights"
        await self._weights.first()
        self._state = "playing"
        self._ready.set()
        await self._weights.follow()

    async def _lease(self) -> None:
        await self._ready.wait()
        while True:
            self._room.clear()
            room = self._config.rollout.episodes_in_flight - len(self._episodes)
            closing = self._stopping or self._draining or self._ended.is_set()
            may_begin = not closing and self._weights.episodes.open
            tickets = await self._lease_tickets(room) if room > 0 and may_begin else []
            if tickets:
                tickets = await self._catch_up(tickets)
            for ticket in tickets:
                self._episodes[ticket.id] = asyncio.create_task(self._play(ticket))
            if not tickets:
                # Not asyncio.wait_for: in Python 3.11 it swallows a cancellation that arrives with the event.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await self._room.wait()

    async def _catch_up(self, tickets: list[Ticket]) -> list[Ticket]:
        """Load what was announced before they were leased; the tickets whose leases have outlived that."""
        self._coming = {ticket.id for ticket in tickets}
        try:
            await self._weights.catch_up()
        except BaseException:
            await asyncio.to_thread(self._buffer.release, self.name, [ticket.id for ticket in tickets])
            raise
        held, self._coming = self._coming, set()
        return [ticket for ticket in tickets if ticket.id in held]

    async def _lease_tickets(self, room: int) -> list[Ticket]:
        lease_s = self._config.rollout.lease_s
        call = asyncio.create_task(asyncio.to_thread(self._buffer.lease, self.name, room, lease_s))
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            await asyncio.to_thread(self._buffer.release, self.name, [ticket.id for ticket in await call])
            raise

    async def _renew(self) -> None:
        lease_s = self._config.rollout.lease_s
        while True:
            await asyncio.sleep(lease_s / 3)
            held = [*self._episodes, *self._coming]
            for ticket in await asyncio.to_thread(self._buffer.renew, self.name, held, lease_s):
                self._abandon(ticket)
            await asyncio.to_thread(self._buffer.expire)

    def _abandon(self, ticket: str) -> None:
        if ticket in self._settling:  # that it is stored may be what ended the lease; if not, the first write wins
            return
        task = self._episodes.pop(ticket, None)
        if task is None and ticket not in self._coming:
            return
        logger.warning("the lease of ticket %s was lost, its episode is abandoned", ticket)
        self._outcomes["abandoned"] += 1
        self._coming.discard(ticket)
        if task is not None:
            task.cancel()
        self._room.set()

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.to_thread(self._buffer.heartbeat, self.name, self.status(), HEARTBEAT_TTL_S)
            self._stopping = await asyncio.to_thread(self._buffer.state) == "stopping"
            if self._stopping and self._episodes:
                logger.info("the run is stopping, %d tickets are given back", len(self._episodes))
                await self._release_all()
            await asyncio.sleep(HEARTBEAT_S)

    async def _measure(self) -> None:
        while True:
            began, before = time.monotonic(), self._engine.stats().response_tokens
            await asyncio.sleep(5 * HEARTBEAT_S)
            self._tokens_per_s = (self._engine.stats().response_tokens - before) / (time.monotonic() - began)

    async def _play(self, ticket: Ticket) -> None:
        """Play and settle one ticket. Who cancels this task settles the ticket himself."""
        try:
            outcome = await self._settle(ticket)
        except AnchorageError as error:
            self._error = self._error or error
            self._ended.set()
            return
        finally:
            self._settling.discard(ticket.id)
        self._outcomes[outcome] += 1
        # A ticket that went back into the queue may have been leased again already, by this very actor.
        if self._episodes.get(ticket.id) is asyncio.current_task():
            del self._episodes[ticket.id]
        self._room.set()

    async def _settle(self, ticket: Ticket) -> str:
        limit = self._config.rollout.episode_timeout_s
        try:
            try:
                async with self._weights.episodes.entered(), asyncio.timeout(limit):
                    trajectory = await self._play_through(ticket)
            finally:
                self._settling.add(ticket.id)
            stored = await asyncio.to_thread(self._buffer.store, trajectory)
        except AnchorageError:
            raise
        except TimeoutError:
            reason = f"the episode took longer than {limit:g} s"
        except EnvironmentUnavailableError as error:
            return await self._give_back(ticket, error)
        except (EpisodeFailed, RequestRejected, CodecError) as error:
            reason = str(error)
        except Exception as error:
            logger.exception("ticket %s cannot be played", ticket.id)
            reason = f"{type(error).__name__}: {error}"
        else:
            if stored in (Stored.DUPLICATE, Stored.UNKNOWN):
                logger.info("the trajectory of ticket %s was not needed: %s", ticket.id, stored.value)
            return "stored"
        logger.warning("ticket %s failed: %s", ticket.id, reason)
        if await asyncio.to_thread(self._buffer.fail, self.name, ticket.id, reason):
            logger.warning("group %s/%d is cancelled", ticket.stream, ticket.group)
        await asyncio.sleep(FAILURE_DELAY_S)
        return "failed"

    async def _play_through(self, ticket: Ticket) -> Trajectory:
        client, env = self._client(ticket), ticket.task.env
        if env not in self._forms:
            self._forms[env] = await action_form(client, self._config, env)
        return await play(
            ticket,
            client,
            self._sampler,
            self._prompts,
            self._config,
            actor=self.name,
            form=self._forms[env],
            alone=self._alone[env],
        )

    def _client(self, ticket: Ticket) -> EnvironmentClient:
        client = self._environments.get(ticket.task.env)
        if client is None:
            raise EpisodeFailed(f"this run has no environment {ticket.task.env}")
        return client

    async def _give_back(self, ticket: Ticket, error: EnvironmentUnavailableError) -> str:
        """The place stays taken for a while: nobody hammers a server that is away."""
        logger.warning("ticket %s goes back in %g s: %s", ticket.id, UNAVAILABLE_DELAY_S, error)
        await asyncio.sleep(UNAVAILABLE_DELAY_S)
        await asyncio.to_thread(self._buffer.release, self.name, [ticket.id])
        return "returned"
