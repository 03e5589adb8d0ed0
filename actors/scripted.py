"""Scripted players: they play through the environment API like the policy does, and make the warm start's data.

An expert's action comes from the environment (`ResetRequest.expert`). Poor play is made from it: an expert that now and
then does something random, and habitual players that know the rules but not the goal.

Invariants
- Everything is decided by the seed: the same seed gives the same episode in every process.
- Every example is what the policy would have read (prompt ids) and should have answered (response ids).
"""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actors.prompts import PromptBuilder
from env_servers.client import EnvironmentClient
from env_servers.protocol import ResetRequest, StepResult
from services.schemas import Task


class Player(Protocol):
    """Chooses an action for a state; None where it has nothing to do."""

    def act(self, result: StepResult) -> str | None: ...


class NoisyExpert:
    """The environment's expert that takes a random admissible action with probability `noise`."""

    def __init__(self, rng: random.Random, noise: float) -> None:
        self._rng = rng
        self._noise = noise

    def act(self, result: StepResult) -> str | None:
        if result.admissible and self._rng.random() < self._noise:
            return self._rng.choice(result.admissible)
        return result.expert


class HabitualPlayer:
    """Knows the commands but no goal: each episode has its own taste in verbs, everything else is chance.

    Taste is a log-normal weight a verb, drawn once an episode, so that some wander, some carry things about, some idle.
    """

    def __init__(self, rng: random.Random, spread: float = 1.5) -> None:
        self._rng = rng
        self._spread = spread
        self._taste: dict[str, float] = {}

    def act(self, result: StepResult) -> str | None:
        by_verb: dict[str, list[str]] = {}
        for action in result.admissible or ():
            by_verb.setdefault(action.split(" ", 1)[0], []).append(action)
        if not by_verb:
            return None
        verbs = sorted(by_verb)
        weights = [self._weight(verb) * math.sqrt(len(by_verb[verb])) for verb in verbs]
        return self._rng.choice(by_verb[self._rng.choices(verbs, weights)[0]])

    def _weight(self, verb: str) -> float:
        if verb not in self._taste:
            self._taste[verb] = self._rng.lognormvariate(0.0, self._spread)
        return self._taste[verb]


@dataclass(frozen=True, slots=True)
class Turn:
    """One state and the action that a scripted player took in it."""

    result: StepResult
    history: Sequence[tuple[str, str]]
    goal: str | None
    action: str


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the response to imitate, as token ids."""

    prompt_ids: list[int]
    response_ids: list[int]


async def play_scripted(client: EnvironmentClient, task: Task, player: Player, max_steps: int) -> AsyncIterator[Turn]:
    """The turns of one episode of `player`."""
    result = await client.reset(ResetRequest(split=task.split, index=task.index, max_steps=max_steps, expert=True))
    goal = result.facts.get("goal")
    history: list[tuple[str, str]] = []
    try:
        while not (result.terminated or result.truncated):
            action = player.act(result)
            if action is None:
                return
            yield Turn(result, tuple(history), str(goal) if goal else None, action)
            history.append((result.observation, action))
            result = await client.step(result.session, result.step + 1, action)
    finally:
        await client.close_session(result.session)


def to_example(turn: Turn, action: str, prompts: PromptBuilder, tokenizer: Any) -> Example:
    """The turn as the policy would see it; the response to imitate is `action` and the end-of-sequence token."""
    prompt = prompts.build(turn.goal, turn.history, turn.result)
    response = tokenizer.encode(" " + action, add_special_tokens=False)
    return Example(prompt.ids, [*response, tokenizer.eos_token_id])
