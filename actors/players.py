"""Who plays an actor's tickets: the prompt template (`TemplatePlayer`), or an agent program (`gateway/player.py`).

Invariants
- A ticket is played to a trajectory, or an error says what becomes of it; a player stores and settles nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Protocol

from actors.engine.interface import Sampler
from actors.episode import EpisodeFailed, action_form, play
from actors.prompts import Prompts
from env_servers.client import EnvironmentClient
from env_servers.protocol import ActionForm
from services.config.tree import Config
from services.schemas import Ticket, Trajectory


class TicketReturned(Exception):
    """The ticket was not played and nothing is wrong with it: it goes back. The message is one line."""


class Player(Protocol):
    """Plays the tickets of one actor, many at the same time."""

    @property
    def limit_s(self) -> float:
        """Time limit of `play`, in seconds."""

    async def start(self) -> None:
        """Prepare to play; called once, before the first ticket. Raises AnchorageError."""

    async def play(self, ticket: Ticket) -> Trajectory:
        """Play a ticket to its end. Cancelling the call abandons it.

        Raises:
            EpisodeFailed: it cannot be played; costs it an attempt.
            TicketReturned: it was not played.
            EnvironmentUnavailableError: no environment server is usable.
            RequestRejected: from an environment's client.
            AnchorageError: the actor cannot go on.
        """

    def room(self, free: int) -> int:
        """How many of the `free` places there is work for."""

    def status(self) -> dict[str, object]:
        """Figures for heartbeats, as plain JSON data."""

    async def close(self) -> None:
        """Release everything. Idempotent."""


class TemplatePlayer:
    """Plays by the run's prompt template.

    Args:
        actor: name to record in trajectories.
        config: of the run.
        environments: a client for each environment, by name.
        sampler: samples responses.
        prompts: builds prompts.
    """

    def __init__(
        self,
        actor: str,
        config: Config,
        environments: Mapping[str, EnvironmentClient],
        sampler: Sampler,
        prompts: Prompts,
    ) -> None:
        self._actor = actor
        self._config = config
        self._environments = environments
        self._sampler = sampler
        self._prompts = prompts
        self._forms: dict[str, ActionForm] = {}
        self._alone = {name: asyncio.Lock() for name in environments}

    @property
    def limit_s(self) -> float:
        return self._config.rollout.episode_timeout_s

    async def start(self) -> None:
        """Nothing is needed."""

    async def play(self, ticket: Ticket) -> Trajectory:
        client, env = client_of(self._environments, ticket), ticket.task.env
        if env not in self._forms:
            self._forms[env] = await action_form(client, self._config, env)
        return await play(
            ticket,
            client,
            self._sampler,
            self._prompts,
            self._config,
            actor=self._actor,
            form=self._forms[env],
            alone=self._alone[env],
        )

    def room(self, free: int) -> int:
        return free

    def status(self) -> dict[str, object]:
        return {}

    async def close(self) -> None:
        """Nothing is held."""


def client_of(environments: Mapping[str, EnvironmentClient], ticket: Ticket) -> EnvironmentClient:
    """The client of a ticket's environment. Raises EpisodeFailed."""
    client = environments.get(ticket.task.env)
    if client is None:
        raise EpisodeFailed(f"this run has no environment {ticket.task.env}")
    return client
