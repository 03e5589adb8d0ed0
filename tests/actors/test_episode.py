"""One episode at a time, with the counting environment in this process."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from actors import episode
from actors.episode import EpisodeFailed, play, step_seed
from actors.prompts import PromptBuilder, load_tokenizer
from env_servers.client import LocalClient, RequestRejected, SessionLost
from env_servers.environment import Observation
from env_servers.protocol import StepResult
from services.config.tree import Config
from services.schemas import Task, Ticket, Trajectory
from tests.actors.scripted_engine import ScriptedEngine
from tests.env_servers.counting import Counting


def ticket(index: int = 1, seed: int = 7, split: str = "train") -> Ticket:
    return Ticket(group=0, member=0, group_size=2, task=Task(env="counting", split=split, index=index), seed=seed)


class Recording(LocalClient):
    """Counts what it is asked, and loses the session of a step as often as told."""

    def __init__(self, environment: type[Counting] = Counting, lose: int = 0) -> None:
        super().__init__(environment)
        self.resets = 0
        self.closes = 0
        self.lose = lose
        self.actions: list[str] = []

    async def reset(self, request):  # type: ignore[no-untyped-def]
        self.resets += 1
        return await super().reset(request)

    async def step(self, session: str, step: int, action: str) -> StepResult:
        if step == 2 and self.lose:
            self.lose -= 1
            raise SessionLost("the server was restarted")
        self.actions.append(action)
        return await super().step(session, step, action)

    async def close_session(self, session: str) -> None:
        self.closes += 1
        await super().close_session(session)


async def play_with(
    config: Config, client: LocalClient, order: Ticket, engine: ScriptedEngine | None = None
) -> Trajectory:
    tokenizer = load_tokenizer(config.model.path)
    prompts = PromptBuilder(config.prompt, tokenizer, config.model.max_prompt_tokens)
    engine = engine or ScriptedEngine(config.model.path)
    await engine.load_weights(3, {})
    try:
        return await play(order, client, engine, prompts, config, actor="a")
    finally:
        await client.close()


async def test_a_step_says_whether_its_response_was_cut(config: Config) -> None:
    for limit, finished in ((1, False), (config.model.max_response_tokens, True)):
        model = config.model.model_copy(update={"max_response_tokens": limit})
        played = await play_with(config.model_copy(update={"model": model}), Recording(), ticket())
        assert {step.finished for step in played.steps} == {finished}


async def test_a_step_holds_what_was_read_said_and_earned(config: Config) -> None:
    client = Recording()
    trajectory = await play_with(config, client, ticket(index=1))
    assert trajectory.won
    assert trajectory.actor == "a"
    assert trajectory.started_at <= trajectory.finished_at
    last = trajectory.steps[-1]
    assert [step.reward for step in trajectory.steps] == [0.0] * (len(trajectory.steps) - 1) + [10.0]
    assert [step.terminated for step in trajectory.steps] == [False] * (len(trajectory.steps) - 1) + [True]
    assert not any(step.truncated for step in trajectory.steps)
    assert trajectory.steps[0].observation == "The count is 0, the target is 3."
    assert last.observation == "The count is 2, the target is 3."
    assert (
        len({step.anchor for step in trajectory.steps if step.observation == "The count is 2, the target is 3."}) == 1
    )
    assert trajectory.steps[0].anchor != last.anchor
    assert last.action == last.response == "up"
    assert last.valid
    assert last.prompt.endswith("The count is 2, the target is 3.\n>")
    for before, after in itertools.pairwise(trajectory.steps):
        begun = [*before.prompt_ids, *before.response_ids]
        assert after.prompt_ids[: len(begun)].tolist() == begun
    assert last.prompt_ids.dtype == last.response_ids.dtype == np.int32
    assert last.logprobs.dtype == np.float32
    assert len(last.logprobs) == len(last.response_ids) == last.versions[0].tokens
    assert last.versions[0].version == trajectory.oldest_version == 3
    assert client.closes == 1
    assert client.actions == [step.action for step in trajectory.steps]


async def test_the_step_limit_truncates(config: Config) -> None:
    trajectory = await play_with(config, Recording(), ticket(index=40))
    assert len(trajectory.steps) == 12
    assert trajectory.steps[-1].truncated
    assert not trajectory.steps[-1].terminated
    assert not trajectory.won


async def test_seeds_depend_on_ticket_and_step_alone(config: Config) -> None:
    engines = [ScriptedEngine(config.model.path) for _ in range(3)]
    first, again, other = [
        await play_with(config, Recording(), ticket(index=9, seed=seed), engine)
        for seed, engine in zip((7, 7, 8), engines, strict=True)
    ]
    assert [step.action for step in first.steps] == [step.action for step in again.steps]
    assert engines[0].seeds == engines[1].seeds == [step_seed(7, number + 1) for number in range(len(first.steps))]
    assert not set(engines[0].seeds) & set(engines[2].seeds)
    assert other.steps
    assert step_seed(7, 1) == 7643869921872156431


async def test_a_lost_session_restarts_the_episode(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episode, "FIRST_DELAY_S", 0.001)
    client = Recording(lose=2)
    trajectory = await play_with(config, client, ticket())
    assert client.resets == client.closes == 3
    assert trajectory.won
    assert client.actions[2:] == [step.action for step in trajectory.steps]


async def test_a_session_that_is_always_lost_fails(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episode, "FIRST_DELAY_S", 0.001)
    client = Recording(lose=100)
    with pytest.raises(EpisodeFailed, match="lost the session 6 times: the server was restarted"):
        await play_with(config, client, ticket())
    assert client.resets == client.closes == 6


async def test_a_task_that_cannot_be_played_is_told(config: Config) -> None:
    with pytest.raises(RequestRejected, match="damaged"):
        await play_with(config, Recording(), ticket(index=0, split="broken"))


class Over(Counting):
    """Ends before it begins."""

    def reset(self, split: str, index: int, *, expert: bool = False) -> Observation:
        return Observation("over", terminated=True)


async def test_an_episode_without_a_step_fails(config: Config) -> None:
    client = Recording(Over)
    with pytest.raises(EpisodeFailed, match="before the first action"):
        await play_with(config, client, ticket())
    assert client.closes == 1
