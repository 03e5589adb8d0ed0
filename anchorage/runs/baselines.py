"""Players without a model on the evaluation panels: the success of chance and of the environment's own expert.

They play the same tasks as a policy would, in this process, or on the server that `env.url` names.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from anchorage.runs import event_loop
from anchorage.runs.environments import environment_class, make_data_known
from env_servers.server.settings import TOKEN_VARIABLE
from services.config.tree import Config, EnvConfig
from services.errors import EnvironmentUnavailable
from services.schemas import Ticket
from services.tasks import split_key

if TYPE_CHECKING:
    from env_servers.client import EnvironmentClient
    from learner.evaluation import EvaluationResult, Outcome

BASELINES = {"random": 1.0, "expert": 0.0}
"""Name to share of random actions."""
AT_ONCE = 32
"""Episodes played concurrently."""


def evaluate_baseline(
    name: str, config: Config, on_progress: Callable[[int, int], None], should_stop: Callable[[], bool] = lambda: False
) -> EvaluationResult:
    """Play the panels with a player of `BASELINES`. `on_progress` gets the numbers of episodes ended and won.

    Once `should_stop` returns True no further episode is begun, and the result is not `complete`.

    Raises:
        EnvironmentUnavailable: the environment cannot be reached, has no such split, or has no expert.
    """
    from env_servers.client import EnvironmentUnavailableError, RequestRejected
    from env_servers.environment import TaskError
    from learner.evaluation import panel, summarise_splits

    async def play_all() -> EvaluationResult:
        clients = {env.name: _client(env) for env in config.environments}
        try:
            splits = {
                split_key(config, env, split): size
                for env, client in clients.items()
                for split, size in (await client.info()).splits.items()
            }
            tickets = panel(config, splits, name)
            outcomes = await _play_all(tickets, clients, name, config, on_progress, should_stop)
        finally:
            for client in clients.values():
                await client.close()
        result = summarise_splits(config, outcomes, tickets, stream=name)
        return replace(result, complete=len(outcomes) == len(tickets))

    try:
        return event_loop.run(play_all())
    except (EnvironmentUnavailableError, RequestRejected, TaskError) as error:
        raise EnvironmentUnavailable(str(error)) from None


def _client(env: EnvConfig) -> EnvironmentClient:
    from env_servers.client import open_client
    from env_servers.clients.local import LocalClient

    if env.addresses:
        return open_client(env.addresses[0], token=os.environ.get(TOKEN_VARIABLE), timeout_s=env.request_timeout_s)
    make_data_known(env)
    return LocalClient(environment_class(env))


async def _play_all(
    tickets: Sequence[Ticket],
    clients: Mapping[str, EnvironmentClient],
    name: str,
    config: Config,
    on_progress: Callable[[int, int], None],
    should_stop: Callable[[], bool],
) -> list[Outcome]:
    """Play the tickets, `AT_ONCE` at a time, and return the outcomes of those that were begun."""
    room = asyncio.Semaphore(AT_ONCE)
    ended = won = 0

    async def play(ticket: Ticket) -> Outcome | None:
        nonlocal ended, won
        async with room:
            if should_stop():
                return None
            outcome = await _play(ticket, clients[ticket.task.env], name, config)
        ended, won = ended + 1, won + outcome.won
        on_progress(ended, won)
        return outcome

    played = await asyncio.gather(*map(play, tickets))
    return [outcome for outcome in played if outcome is not None]


async def _play(ticket: Ticket, client: EnvironmentClient, name: str, config: Config) -> Outcome:
    from actors.episode import is_won
    from actors.parsing import is_admissible
    from actors.scripted import NoisyExpert
    from env_servers.protocol import ResetRequest
    from learner.evaluation import Outcome

    player = NoisyExpert(random.Random(ticket.seed), BASELINES[name], mistakes=0.0)
    task, steps, valid = ticket.task, 0, 0
    limit = config.environment(task.env).max_steps
    state = await client.reset(
        ResetRequest(split=task.split, index=task.index, max_steps=limit, expert=name == "expert")
    )
    session, facts = state.session, dict(state.facts)
    try:
        while not state.done and (action := player.act(state)) is not None:
            listed = state.admissible is None or is_admissible(action, state.admissible)
            state = await client.step(session, steps + 1, action)
            steps, valid = steps + 1, valid + (listed and state.accepted)
            facts |= state.facts
    finally:
        await client.close_session(session)
    facts["won"] = is_won(facts, state, config.environment(task.env).won_at)
    return Outcome.of(ticket, facts, config, steps=steps, valid=valid)
