"""Scripted players: they play through the environment API like the policy does, and make the warm start's data.

An expert's action comes from the environment (`ResetRequest.expert`). Poor play is made from it: an expert that now and
then does something random, and habitual players that know the rules but not the goal.

Invariants
- Everything is decided by the seed: the same seed gives the same episode in every process.
- Every example is what the policy would have read and written, token for token.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from actors.parsing import is_admissible
from actors.prompts import Exchange, PromptBuilder
from env_servers.client import EnvironmentClient
from env_servers.protocol import ResetRequest, StepResult
from services.schemas import Task

_NUMBERED_NAME = re.compile(r"\b([a-z]+) (\d+)\b")


class Player(Protocol):
    """Chooses an action for a state; None where it has nothing to do."""

    def act(self, result: StepResult) -> str | None: ...


class NoisyExpert:
    """The environment's expert that with probability `noise` does something else.

    That is a random admissible action, or, for a share `mistakes` of them, one that was so before but no longer is.
    With probability `slips` the number in the action (`desk 1`) is then drawn anew, which makes it wrong as a young
    policy is wrong. Actions to `avoid` are never taken at random.
    """

    def __init__(
        self,
        rng: random.Random,
        noise: float,
        *,
        mistakes: float = 0.1,
        slips: float = 0.0,
        avoid: Collection[str] = (),
    ) -> None:
        self._rng = rng
        self._noise = noise
        self._mistakes = mistakes
        self._slips = slips
        self._avoid = avoid
        self._met: dict[str, None] = {}

    def act(self, result: StepResult) -> str | None:
        action = self._choose(result)
        if action is not None and self._slips and self._rng.random() < self._slips:
            return _NUMBERED_NAME.sub(lambda name: f"{name[1]} {self._rng.randint(1, 4)}", action, count=1)
        return action

    def _choose(self, result: StepResult) -> str | None:
        choices = [action for action in result.admissible or () if action not in self._avoid]
        past = [action for action in self._met if action not in choices]
        self._met.update(dict.fromkeys(choices))
        if not choices or self._rng.random() >= self._noise:
            return result.expert
        mistaken = past and self._rng.random() < self._mistakes
        return self._rng.choice(past if mistaken else choices)


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
    goal: str | None
    action: str


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt, the responses in it and what was seen between them, as one row of tokens.

    Attributes:
        tokens: ids, as the policy would have read and written them.
        imitate: for every token whether it belongs to a response to imitate.
    """

    tokens: list[int]
    imitate: list[bool]


async def play_scripted(client: EnvironmentClient, task: Task, player: Player, max_steps: int) -> AsyncIterator[Turn]:
    """The turns of one episode of `player`."""
    result = await client.reset(ResetRequest(split=task.split, index=task.index, max_steps=max_steps, expert=True))
    goal = result.facts.get("goal")
    try:
        while not (result.terminated or result.truncated):
            action = player.act(result)
            if action is None:
                return
            yield Turn(result, str(goal) if goal else None, action)
            result = await client.step(result.session, result.step + 1, action)
    finally:
        await client.close_session(result.session)


def renumbered(turns: Sequence[Turn], rng: random.Random) -> list[Turn]:
    """The episode with the numbers of each name permuted throughout, so that to name a thing is to copy its name."""
    numbers: dict[str, set[str]] = {}
    for turn in turns:
        for name, number in _NUMBERED_NAME.findall(turn.result.observation):
            numbers.setdefault(name, set()).add(number)
    new: dict[tuple[str, str], str] = {}
    for name in sorted(numbers):
        before = sorted(numbers[name])
        new |= {(name, number): other for number, other in zip(before, rng.sample(before, len(before)), strict=True)}

    def rename(text: str) -> str:
        return _NUMBERED_NAME.sub(lambda found: f"{found[1]} {new.get((found[1], found[2]), found[2])}", text)

    def renamed(turn: Turn) -> Turn:
        result = turn.result
        changes = {
            "observation": rename(result.observation),
            "admissible": result.admissible and [rename(action) for action in result.admissible],
            "expert": result.expert and rename(result.expert),
        }
        return replace(turn, result=result.model_copy(update=changes), action=rename(turn.action))

    return [renamed(turn) for turn in turns]


def to_examples(turns: Sequence[Turn], prompts: PromptBuilder, tokenizer: Any, only_experts: bool) -> Iterator[Example]:
    """The episode as the policy would see it; a prompt that goes on from the row before it becomes part of that row.

    Admissible actions are imitated, or with `only_experts` those that the expert would have taken as well.
    """
    history: list[Exchange] = []
    row: Example | None = None
    for turn in turns:
        result, response = turn.result, " " + turn.action
        prompt = prompts.build(turn.goal, history, result)
        ids = [*tokenizer.encode(response, add_special_tokens=False), tokenizer.eos_token_id]
        history.append(Exchange(result.observation, turn.action, response, ids))
        if row is None or prompt.ids[: len(row.tokens)] != row.tokens:
            if row is not None:
                yield row
            row = Example([], [])
        allowed = result.admissible is None or is_admissible(turn.action, result.admissible)
        good = turn.action == result.expert if only_experts else allowed
        row.imitate.extend([False] * (len(prompt.ids) - len(row.tokens)) + [good] * len(ids))
        row.tokens.extend(prompt.ids[len(row.tokens) :] + ids)
    if row is not None:
        yield row
