"""Scripted players: play through the environment API as the policy does, and make the warm start's data.

An expert's action comes from the environment (`ResetRequest.expert`). Imperfect play is derived from it: an expert that
sometimes acts at random, and habitual players that know the rules but not the goal. If a policy plays, a scripted
player gives the actions it would have taken in the states that the policy reaches (DAgger, arXiv:1011.0686).

Invariants
- The seed determines everything: the same seed gives the same episode in every process.
- Every example is what the policy would have read and written, token for token.
"""

from __future__ import annotations

import functools
import math
import random
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from actors.engine.interface import Sampler
from actors.episode import respond
from actors.prompts import Exchange, Prompts
from env_servers import free_text
from env_servers.client import EnvironmentClient
from env_servers.protocol import ActionForm, ResetRequest, StepResult
from services.config.tree import Config
from services.schemas import Task

_NUMBERED_NAME = re.compile(r"\b([a-z]+) (\d+)\b")
_NUMBER_SPREAD = 2.0


Distribution = Mapping[str, float]
"""Probabilities by admissible action."""


class Player(Protocol):
    """Chooses actions. If an action leaves a text open, fills it with words of the goal."""

    def act(self, result: StepResult) -> str | None:
        """Action to take in a state; None if there is nothing to do."""

    def intent(self, result: StepResult) -> Distribution:
        """Distribution of the actions intended in a state, without the mistakes of `act` and without open texts."""


class NoisyExpert:
    """The environment's expert, with random actions mixed in.

    Args:
        rng: source of all randomness.
        noise: probability of a random action instead of the expert's.
        mistakes: share of the random actions that were admissible earlier but no longer are; the others are admissible.
        slips: probability that the number in the action (`desk 1`) is replaced by a random one, a mistake that an
            untrained policy makes.
        avoid: actions never taken at random.
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

    def intent(self, result: StepResult) -> Distribution:
        choices = [action for action in self._allowed(result) if not free_text.is_open(action)]
        chances = dict.fromkeys(choices, self._noise / len(choices)) if choices else {}
        if result.expert is not None:
            chances[result.expert] = chances.get(result.expert, 0.0) + 1.0 - self._noise
        return chances

    def act(self, result: StepResult) -> str | None:
        action = self._choose(result)
        if action is not None:
            action = free_text.fill(action, result, self._rng)
        if action is not None and self._slips and self._rng.random() < self._slips:
            return _NUMBERED_NAME.sub(lambda name: f"{name[1]} {self._rng.randint(1, 4)}", action, count=1)
        return action

    def _choose(self, result: StepResult) -> str | None:
        choices = self._allowed(result)
        past = [action for action in self._met if action not in choices]
        self._met.update(dict.fromkeys(choices))
        if not choices or self._rng.random() >= self._noise:
            return result.expert
        mistaken = past and self._rng.random() < self._mistakes
        return self._rng.choice(past if mistaken else choices)

    def _allowed(self, result: StepResult) -> list[str]:
        return [action for action in result.admissible or () if action not in self._avoid]


class HabitualPlayer:
    """Knows the commands but not the goal: prefers some verbs in each episode, and is random otherwise.

    The preference is a log-normal weight for each verb, drawn once an episode: some wander, some carry, some idle.

    Args:
        rng: source of all randomness.
        spread: standard deviation of the weights' logarithms.
    """

    def __init__(self, rng: random.Random, spread: float = 1.5) -> None:
        self._rng = rng
        self._spread = spread
        self._taste: dict[str, float] = {}

    def intent(self, result: StepResult) -> Distribution:
        by_verb: dict[str, list[str]] = {}
        for action in result.admissible or ():
            if free_text.is_open(action):
                continue
            by_verb.setdefault(action.split(" ", 1)[0], []).append(action)
        # Sorted, because weights are drawn when a verb first occurs.
        weights = {verb: self._weight(verb) / math.sqrt(len(by_verb[verb])) for verb in sorted(by_verb)}
        total = sum(weights[verb] * len(actions) for verb, actions in by_verb.items())
        return {action: weights[verb] / total for verb, actions in by_verb.items() for action in actions}

    def act(self, result: StepResult) -> str | None:
        chances = self.intent(result)
        if chances:
            return self._rng.choices([*chances], [*chances.values()])[0]
        left_open = result.admissible or ()
        return free_text.fill(self._rng.choice(left_open), result, self._rng) if left_open else None

    def _weight(self, verb: str) -> float:
        if verb not in self._taste:
            self._taste[verb] = self._rng.lognormvariate(0.0, self._spread)
        return self._taste[verb]


class PolicyPlayer:
    """A policy at temperature 1, for one episode.

    Args:
        sampler: samples responses.
        prompts: builds prompts.
        config: of the run.
        seed: of the episode.
        form: how the environment wants actions to be normalised.
    """

    def __init__(
        self, sampler: Sampler, prompts: Prompts, config: Config, seed: int, form: ActionForm = "as_written"
    ) -> None:
        self._sampler = sampler
        self._prompts = prompts.begin()
        self._config = config
        self._seed = seed
        self._form = form
        self._history: list[Exchange] = []

    async def act(self, goal: str | None, result: StepResult) -> str:
        """Sample the policy's action in a state, admissible or not.

        Raises:
            EngineFailed: from the sampler.
        """
        _, sample, parsed = await respond(
            self._sampler,
            self._prompts,
            self._config,
            goal,
            self._history,
            result,
            temperature=1.0,
            seed=self._seed,
            form=self._form,
        )
        said = (sample.text, sample.token_ids, parsed.answer, result.admissible)
        self._history.append(Exchange(result.observation, parsed.action, *said))
        return parsed.action


@dataclass(frozen=True, slots=True)
class Turn:
    """One state of an episode.

    Attributes:
        result: the state.
        goal: of the episode.
        action: taken in the state.
        intent: distribution that the scripted player intended.
    """

    result: StepResult
    goal: str | None
    action: str
    intent: Distribution


@dataclass(frozen=True, slots=True)
class Answer:
    """One call of the policy, with what it should have written.

    Attributes:
        prompt: token ids.
        response: token ids, its end included.
        targets: for each token of the response, see `Example`.
    """

    prompt: Sequence[int]
    response: Sequence[int]
    targets: Sequence[Mapping[int, float]]


@dataclass(frozen=True, slots=True)
class Example:
    """A row of tokens: a prompt, then responses and the observations between them.

    Attributes:
        tokens: ids as the policy would have read and written them.
        targets: for each token, the distribution to imitate in its place, as probabilities by token id; empty: none.
    """

    tokens: list[int]
    targets: list[Mapping[int, float]]


async def play_scripted(
    client: EnvironmentClient, task: Task, player: Player, max_steps: int, policy: PolicyPlayer | None = None
) -> AsyncIterator[Turn]:
    """Play one episode and yield its turns.

    Args:
        client: of the task's environment.
        task: to play.
        player: gives the intent in each state, and acts if there is no policy.
        max_steps: step limit of the episode.
        policy: acts instead of the player; None: the player does.
    """
    result = await client.reset(ResetRequest(split=task.split, index=task.index, max_steps=max_steps, expert=True))
    goal = str(result.facts["goal"]) if result.facts.get("goal") else None
    try:
        while not result.done:
            action = player.act(result) if policy is None else await policy.act(goal, result)
            if action is None:
                return
            yield Turn(result, goal, action, player.intent(result))
            result = await client.step(result.session, result.step + 1, action)
    finally:
        await client.close_session(result.session)


def renumbered(turns: Sequence[Turn], rng: random.Random) -> list[Turn]:
    """Replace the numbers of things throughout an episode, also by higher ones: naming a thing becomes copying it.

    Example: `desk 1` and `desk 2` may become `desk 3` and `desk 1` in every observation, action and intent.

    Args:
        turns: of one episode.
        rng: source of the new numbers.
    """
    numbers: dict[str, set[str]] = {}
    for turn in turns:
        for name, number in _NUMBERED_NAME.findall(turn.result.observation):
            numbers.setdefault(name, set()).add(number)
    new: dict[tuple[str, str], str] = {}
    for name in sorted(numbers):
        before = sorted(numbers[name])
        choice = range(1, math.ceil(len(before) * rng.uniform(1.0, _NUMBER_SPREAD)) + 1)
        new |= {(name, old): str(number) for old, number in zip(before, rng.sample(choice, len(before)), strict=True)}

    def rename(text: str) -> str:
        return _NUMBERED_NAME.sub(lambda found: f"{found[1]} {new.get((found[1], found[2]), found[2])}", text)

    def renamed(turn: Turn) -> Turn:
        result = turn.result
        changes = {
            "observation": rename(result.observation),
            "admissible": result.admissible and [rename(action) for action in result.admissible],
            "expert": result.expert and rename(result.expert),
        }
        intent = {rename(action): chance for action, chance in turn.intent.items()}
        return replace(turn, result=result.model_copy(update=changes), action=rename(turn.action), intent=intent)

    return [renamed(turn) for turn in turns]


def to_examples(turns: Sequence[Turn], prompts: Prompts, tokenizer: Any, only_experts: bool) -> Iterator[Example]:
    """Convert an episode to rows as the policy would see it. A prompt that continues the row before joins that row.

    Targets are the player's probabilities, or with `only_experts` the expert's choice, token by token along the action
    that was taken. A mistaken action has targets as far as it is the prefix of an intended one.

    Args:
        turns: of one episode.
        prompts: builds prompts.
        tokenizer: of the policy.
        only_experts: whether to imitate only the expert's action where there is one.

    Example: the action taken is `go left`; intended are `go right` 0.75, `go left` 0.25. Its tokens have the targets

        go      {go: 1.0}
        left    {right: 0.75, left: 0.25}
        <eos>   {<eos>: 1.0}
    """

    @functools.cache
    def spelled(action: str) -> list[int]:
        return [*episode.response_ids(action), tokenizer.eos_token_id]

    episode = prompts.begin()

    def answers() -> Iterator[Answer]:
        history: list[Exchange] = []
        for turn in turns:
            result = turn.result
            prompt = episode.build(turn.goal, history, result)
            ids = spelled(turn.action)
            said = (episode.response(turn.action), ids, episode.answer(turn.action), result.admissible)
            history.append(Exchange(result.observation, turn.action, *said))
            intent = {result.expert: 1.0} if only_experts and result.expert else turn.intent
            intended = [(spelled(action), chance) for action, chance in intent.items()]
            yield Answer(prompt.ids, ids, [*next_tokens(ids, intended)])

    return rows_of(answers())


def rows_of(answers: Iterable[Answer]) -> Iterator[Example]:
    """Rows of an episode's calls. A prompt that continues the row before joins that row."""
    row: Example | None = None
    for answer in answers:
        prompt = [*answer.prompt]
        if row is None or prompt[: len(row.tokens)] != row.tokens:
            if row is not None:
                yield row
            row = Example([], [])
        row.targets.extend({} for _ in range(len(prompt) - len(row.tokens)))
        row.tokens.extend([*prompt[len(row.tokens) :], *answer.response])
        row.targets.extend(answer.targets)
    if row is not None:
        yield row


def next_tokens(path: Sequence[int], intended: Sequence[tuple[list[int], float]]) -> Iterator[dict[int, float]]:
    """Distribution of each token of a path, given those before it; empty once the path leaves everything intended.

    Args:
        path: token ids of the action taken.
        intended: token ids and probability of each intended action.
    """
    for place, token in enumerate(path):
        mass: defaultdict[int, float] = defaultdict(float)
        for ids, chance in intended:
            mass[ids[place]] += chance
        total = sum(mass.values())
        yield {wanted: chance / total for wanted, chance in mass.items() if chance > 0}
        intended = [(ids, chance) for ids, chance in intended if ids[place] == token]
