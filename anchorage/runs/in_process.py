"""Plays evaluation panels in this process, without Redis, Ray and vLLM; environments too, or on their servers.

Invariants
- Once a stop is requested no further episode is begun, and those in flight are cancelled.
- Whatever ends the panels, every session and every client is closed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anchorage.runs.environments import environment_class, make_data_known
from env_servers.server.settings import TOKEN_VARIABLE
from services.config.tree import Config, EnvConfig
from services.schemas import Ticket
from services.tasks import split_key

if TYPE_CHECKING:
    from env_servers.client import EnvironmentClient
    from learner.evaluation import Outcome

STOP_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Cancelled:
    """An episode that could not be played, and why."""

    ticket: Ticket
    reason: str


Play = Callable[[Ticket, "EnvironmentClient"], Awaitable["Outcome | Cancelled"]]


@dataclass(frozen=True, slots=True)
class Played:
    """The episodes of the panels: all tickets, and what became of those that ended."""

    tickets: Sequence[Ticket]
    outcomes: Sequence[Outcome]
    cancelled: Sequence[Cancelled]

    @property
    def complete(self) -> bool:
        """Whether every episode ended."""
        return len(self.outcomes) + len(self.cancelled) == len(self.tickets)


async def play_panels(
    config: Config,
    stream: str,
    play: Play,
    *,
    at_once: int,
    on_progress: Callable[[int, int], None],
    should_stop: Callable[[], bool],
) -> Played:
    """Play each ticket of the panels with `play`.

    Args:
        config: of the run.
        stream: of the tickets.
        play: plays one; what it raises ends the panels.
        at_once: episodes played concurrently.
        on_progress: called with the numbers of episodes ended and won.
        should_stop: asked before each episode and several times a second.

    Raises:
        EnvironmentUnavailable: the environment has no such split, or too few tasks for the panels.
        EnvironmentUnavailableError, RequestRejected: from the clients.
    """
    from learner.evaluation import panel

    clients = {env.name: _client(env) for env in config.environments}
    try:
        splits = {
            split_key(config, env, split): size
            for env, client in clients.items()
            for split, size in (await client.info()).splits.items()
        }
        tickets = panel(config, splits, stream)
        room = asyncio.Semaphore(at_once)
        ended = won = 0

        async def play_one(ticket: Ticket) -> Outcome | Cancelled | None:
            nonlocal ended, won
            async with room:
                if should_stop():
                    return None
                outcome = await play(ticket, clients[ticket.task.env])
            ended += 1
            won += not isinstance(outcome, Cancelled) and outcome.won
            on_progress(ended, won)
            return outcome

        ends = [end for end in await _all_of([play_one(ticket) for ticket in tickets], should_stop) if end is not None]
    finally:
        for client in clients.values():
            await client.close()
    cancelled = [end for end in ends if isinstance(end, Cancelled)]
    return Played(tickets, [end for end in ends if not isinstance(end, Cancelled)], cancelled)


async def _all_of(
    plays: Sequence[Awaitable[Outcome | Cancelled | None]], should_stop: Callable[[], bool]
) -> list[Outcome | Cancelled | None]:
    """What the plays return, in their order, but those that a stop cancels. Raises the first error of one."""
    tasks = [asyncio.ensure_future(play) for play in plays]
    pending = set(tasks)
    try:
        while pending:
            done, pending = await asyncio.wait(pending, timeout=STOP_POLL_S, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                if not task.cancelled():
                    task.result()
            if should_stop():
                break
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # of all: several may have failed at the same time
    return [task.result() for task in tasks if not task.cancelled() and task.exception() is None]


def _client(env: EnvConfig) -> EnvironmentClient:
    from env_servers.client import open_client
    from env_servers.clients.local import LocalClient

    if env.addresses:
        return open_client(env.addresses[0], token=os.environ.get(TOKEN_VARIABLE), timeout_s=env.request_timeout_s)
    make_data_known(env)
    return LocalClient(environment_class(env))
