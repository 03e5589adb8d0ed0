"""One session of an environment, and the checks of every observation."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from pydantic_core import to_json

from env_servers.environment import Environment, Observation
from env_servers.protocol import AnchorKind, ResetRequest, StepResult, invalid_value

logger = logging.getLogger(__name__)

_JSON_AS_THEY_ARE = frozenset({bool, int, float, type(None)})


class Session:
    """One live episode.

    Attributes:
        id: the session's id.
        environment: the environment that plays it.
        anchor: the kind of anchor in its results.
        max_steps: number of actions after which it is truncated; None: no limit.
        last: the observation after step number `steps`, which answers a repeat of that step.
        steps: actions taken so far.
        running: the step in progress, for a blocking environment.
        hung: whether a call was abandoned in this environment.
        used_at: the table's clock at the last use.
    """

    __slots__ = ("anchor", "environment", "hung", "id", "last", "max_steps", "running", "steps", "used_at")

    def __init__(
        self, identity: str, environment: Environment, request: ResetRequest, last: Observation, used_at: float
    ) -> None:
        self.id = identity
        self.environment = environment
        self.anchor: AnchorKind = request.anchor
        self.max_steps = request.max_steps
        self.last = last
        self.steps = 0
        self.running: asyncio.Future[StepResult] | None = None
        self.hung = False
        self.used_at = used_at

    @property
    def done(self) -> bool:
        return self.last.terminated or self.last.truncated

    def result(self) -> StepResult:
        last = self.last
        return StepResult(
            session=self.id,
            step=self.steps,
            observation=last.text,
            reward=last.reward,
            terminated=last.terminated,
            truncated=last.truncated,
            admissible=None if last.admissible is None else list(last.admissible),
            anchor=last.state if self.anchor == "state" else last.text,
            facts=dict(last.facts),
            expert=last.expert,
            accepted=last.accepted,
        )


class WrongValue(ValueError):
    """An environment returned an invalid reward or fact. The message names it and may be shown to clients."""


def checked(observation: Observation) -> Observation:
    """Return the observation itself. Raises WrongValue if its reward or facts are invalid."""
    problem = invalid_value(observation.reward, observation.facts)
    if problem is not None:
        raise WrongValue(f"the environment returned an invalid value: {problem}")
    return observation


def limited(observation: Observation, steps: int, max_steps: int | None) -> Observation:
    """The observation, truncated if the step limit is reached. A terminated episode is never truncated."""
    truncated = not observation.terminated and (observation.truncated or steps == max_steps)
    return observation if truncated == observation.truncated else replace(observation, truncated=truncated)


def sendable(result: StepResult) -> StepResult:
    """Return the result itself. Raises if it cannot be written as JSON; costs a fraction of writing it."""
    texts = [result.observation, result.anchor, result.expert or "", *(result.admissible or ())]
    for name, value in result.facts.items():
        texts.append(name)
        kind = type(value)
        if kind is str:
            texts.append(value)
        elif kind not in _JSON_AS_THEY_ARE:
            to_json(value)
    "".join(texts).encode()
    return result


def close_environment(environment: Environment) -> None:
    """Close an environment. An exception is logged."""
    try:
        environment.close()
    except Exception:
        logger.exception("environment %s: close failed", environment.name)
