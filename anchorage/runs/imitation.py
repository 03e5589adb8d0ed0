"""Rows of a warm start from episodes of the run's agent program, which a scripted player answers in the policy's place.

Invariants
- The agent, the gateway and the chat template are those of a run: the rows are what a run would record.
- The episodes come out in the order of their tasks: what is yielded depends on the seed alone, as far as the agent's
  requests do.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from actors.engine.interface import EngineFailed, Sample
from actors.episode import EpisodeFailed
from actors.gateway.player import AgentPlayer
from actors.gateway.render import Renderer
from actors.gateway.session import Bound
from actors.imitation import ActionWriter, Imitation
from actors.scripted import Example, HabitualPlayer, NoisyExpert, Player, rows_of
from anchorage.runs.environments import environment_class
from env_servers.clients.local import LocalClient
from services.config.agent import AgentConfig
from services.config.tree import Config, WarmstartPhase
from services.errors import AnchorageError
from services.schemas import Task, Ticket

logger = logging.getLogger(__name__)

AT_ONCE = 32
MOST_FAILURES = 20
"""Episodes in a row that may fail."""


class AgentPlaysNothing(AnchorageError):
    """The agent program's episodes fail, one after the other."""


class _NoEngine:
    """Stands where scripted players answer every call."""

    async def generate(
        self, prompt_ids: Sequence[int], *, temperature: float, max_tokens: int, seed: int, stop: Sequence[str] = ()
    ) -> Sample:
        raise EngineFailed("no engine answers here")


def agent_rows(
    config: Config,
    agent: AgentConfig,
    phase: WarmstartPhase,
    tasks: Iterator[tuple[Task, random.Random]],
    tokenizer: Any,
    engine: Any = None,
) -> Generator[list[Example], None, None]:
    """Yield the rows of one episode after the other, without end. Close the generator: it holds processes.

    Args:
        config: of the run.
        agent: its agents.
        phase: says who answers, as for `warmstart`'s other episodes.
        tasks: to play, each with a random generator of its own.
        tokenizer: of the policy, with its chat template.
        engine: plays the share `phase.own_play` of the episodes itself; None: scripted players play all.

    Raises:
        AgentPlaysNothing: see there.
        AnchorageError: the agent cannot be started, or none of its tools takes actions.
    """
    attempts: dict[str, tuple[Player, bool]] = {}
    imitations: dict[str, Imitation] = {}
    reasons: deque[str] = deque(maxlen=1)
    writer = ActionWriter(Renderer(tokenizer, template_kwargs=agent.template_kwargs, history=agent.history))
    low, high = phase.noise

    def stand_in(session: Bound) -> Imitation:
        player, plays = attempts[session.ticket.id]
        made = Imitation(session, player, writer, only_experts=phase.imitate == "expert", plays=plays)
        imitations[session.ticket.id] = made
        return made

    async def episode(number: int, task: Task, rng: random.Random) -> list[Example]:
        ticket = Ticket(group=number, member=0, group_size=1, task=task, seed=rng.getrandbits(62))
        player: Player = HabitualPlayer(rng)
        if rng.random() < phase.expert_share:
            player = NoisyExpert(rng, rng.uniform(low, high), slips=phase.slips, avoid=phase.avoid)
        attempts[ticket.id] = player, engine is None or rng.random() >= phase.own_play
        try:
            await host.play(ticket)
            return [*rows_of(imitations[ticket.id].answers)]
        except EpisodeFailed as error:
            logger.warning("warm start: task %s/%d: %s", task.split, task.index, error)
            reasons.append(str(error))
            return []
        finally:
            del attempts[ticket.id]
            imitations.pop(ticket.id, None)

    async def episodes(begun: Sequence[tuple[int, tuple[Task, random.Random]]]) -> list[list[Example]]:
        return await asyncio.gather(*(episode(number, task, rng) for number, (task, rng) in begun))

    client = LocalClient(environment_class(config.env))
    with asyncio.Runner() as runner:
        host = _host(runner, config, agent, {config.env.name: client}, engine or _NoEngine(), tokenizer, stand_in)
        try:
            if engine is not None:
                runner.run(engine.start())
            runner.run(host.start())
            numbered, failed = enumerate(tasks), 0
            while True:
                for rows in runner.run(episodes([*itertools.islice(numbered, AT_ONCE)])):
                    failed = 0 if rows else failed + 1
                    if failed > MOST_FAILURES:
                        raise AgentPlaysNothing(f"{failed} episodes in a row failed, the last one: {reasons[-1]}")
                    if rows:
                        yield rows
        finally:
            runner.run(host.close())
            runner.run(client.close())
            if engine is not None:
                runner.run(engine.stop())


def _host(
    runner: asyncio.Runner,
    config: Config,
    agent: AgentConfig,
    environments: Any,
    engine: Any,
    tokenizer: Any,
    stand_in: Any,
) -> AgentPlayer:
    """The agents' host, made on the runner's loop."""

    async def made() -> AgentPlayer:
        return AgentPlayer("warm start", config, agent, environments, engine, tokenizer, stand_in=stand_in)

    return runner.run(made())
