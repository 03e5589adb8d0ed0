"""Plays tasks for a check and compares the episodes.

Invariants
- The actions of an episode depend on its task and on what was seen, never on when it is played or on other sessions.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from env_servers.clients.interface import EnvironmentClient, RequestRejected
from env_servers.free_text import fill
from env_servers.protocol import EnvInfo, ResetRequest, StepResult

BLIND_ACTIONS = ("look", "help", "yes", "no", "1")
MAX_SHOWN_CHARS = 60


@dataclass(frozen=True)
class Plan:
    """How a check plays.

    Attributes:
        tasks: the tasks to play.
        steps: maximum number of actions of an episode.
        actions: actions to try where the server lists none.
    """

    tasks: tuple[ResetRequest, ...]
    steps: int
    actions: tuple[str, ...] = BLIND_ACTIONS


def sample_tasks(info: EnvInfo, count: int) -> tuple[ResetRequest, ...]:
    """About `count` tasks of all splits: the first and the last of each, and random ones between."""
    tasks = []
    splits = {name: size for name, size in info.splits.items() if size > 0}
    for name, size in splits.items():
        wanted = min(size, max(2, count // len(splits)))
        between = random.Random(name).sample(range(size), wanted)
        indices = dict.fromkeys([0, size - 1, *between])
        tasks += [ResetRequest(split=name, index=index) for index in list(indices)[:wanted]]
    return tuple(tasks)


async def turns(
    client: EnvironmentClient, request: ResetRequest, plan: Plan, salt: str = ""
) -> AsyncIterator[StepResult]:
    """Play a task and yield its results, the reset's first. The session is closed at the end.

    Args:
        client: plays.
        request: the task.
        plan: how far, and with which actions.
        salt: another salt gives other actions.
    """
    rng = random.Random(f"{request.split}/{request.index}/{salt}")
    try:
        seen = await client.reset(request)
    except RequestRejected as error:
        raise RequestRejected(f"{request.split}/{request.index} cannot be reset: {error}") from error
    try:
        yield seen
        for _ in range(plan.steps):
            if seen.done:
                return
            action = fill(rng.choice(seen.admissible or plan.actions), seen, rng)
            seen = await client.step(seen.session, seen.step + 1, action)
            yield seen
    finally:
        await client.close_session(seen.session)


async def transcript(client: EnvironmentClient, request: ResetRequest, plan: Plan, salt: str = "") -> list[StepResult]:
    """All results of `turns`."""
    return [seen async for seen in turns(client, request, plan, salt)]


def difference(first: Sequence[StepResult], second: Sequence[StepResult]) -> str | None:
    """The first difference between two episodes of one task, in words; None if there is none.

    Session ids are not compared.
    """
    for one, other in zip(first, second, strict=False):
        for name in StepResult.model_fields:
            a, b = getattr(one, name), getattr(other, name)
            if name != "session" and a != b:
                return f"step {one.step}: {name} was {_shown(a)}, then {_shown(b)}"
    if len(first) != len(second):
        return f"{len(first) - 1} steps, then {len(second) - 1}"
    return None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}…"
