"""Players without a model on the evaluation panels: the success of chance and of the environment's own expert.

They play the same tasks as a policy would, in this process, or on the server that `env.url` names.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from anchorage.runs import event_loop
from anchorage.runs.in_process import play_panels
from services.config.tree import Config
from services.errors import EnvironmentUnavailable
from services.schemas import Ticket

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
    from learner.evaluation import summarise_splits

    async def play(ticket: Ticket, client: EnvironmentClient) -> Outcome:
        return await _play(ticket, client, name, config)

    try:
        played = event_loop.run(
            play_panels(config, name, play, at_once=AT_ONCE, on_progress=on_progress, should_stop=should_stop)
        )
    except (EnvironmentUnavailableError, RequestRejected, TaskError) as error:
        raise EnvironmentUnavailable(str(error)) from None
    result = summarise_splits(config, played.outcomes, played.tickets, stream=name)
    return replace(result, complete=played.complete)


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
