"""One session of an environment, and what holds for every answer of it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from pydantic_core import to_json

from env_servers.environment import Environment, Observation
from env_servers.numbers import fault
from env_servers.protocol import AnchorKind, ResetRequest, StepResult

logger = logging.getLogger(__name__)

_JSON_AS_THEY_ARE = frozenset({bool, int, float, type(None)})


class Session:
    """One live episode. `last` answers a repeat of step number `steps`; `hung`: a call never came back."""

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
    """What an environment told cannot be; the message says what, and may be shown to clients."""


def checked(observation: Observation) -> Observation:
    """The observation itself; raises WrongValue where its reward or facts are not what they must be."""
    problem = fault(observation.reward, observation.facts)
    if problem is not None:
        raise WrongValue(f"the environment gave a wrong value: {problem}")
    return observation


def limited(observation: Observation, steps: int, max_steps: int | None) -> Observation:
    """A task that ends by its own rules is not truncated, whatever the limits say."""
    truncated = not observation.terminated and (observation.truncated or steps == max_steps)
    return observation if truncated == observation.truncated else replace(observation, truncated=truncated)


def sendable(result: StepResult) -> StepResult:
    """The result itself; raises where JSON cannot hold it. Takes a fraction of the time of writing it."""
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
    """Close it; a failure is logged."""
    try:
        environment.close()
    except Exception:
        logger.exception("environment %s failed at close", environment.name)
