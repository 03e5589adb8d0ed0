"""One episode at a time, with the counting environment in this process."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from actors import episode
from actors.engine.interface import Sample
from actors.episode import Answerer, EpisodeFailed, play, step_seed
from actors.prompts import Prompt, PromptBuilder, load_tokenizer
from env_servers.client import EnvironmentUnavailableError, RequestRejected, SessionLost, open_client
from env_servers.clients.local import LocalClient
from env_servers.environment import Environment, Observation
from env_servers.launch import start_server
from env_servers.protocol import MAX_ACTION_CHARS, StepResult
from services.backoff import Backoff
from services.codec import decode, encode
from services.config.tree import Config, PromptConfig
from services.schemas import Task, Ticket, Trajectory
from tests.actors.scripted_engine import ScriptedEngine
from tests.env_servers.counting import Counting
from tests.env_servers.launching import launch
from tests.env_servers.openenv.venvs import NoOpenEnv, python_with_openenv


def ticket(index: int = 1, seed: int = 7, split: str = "train") -> Ticket:
    return Ticket(group=0, member=0, group_size=2, task=Task(env="counting", split=split, index=index), seed=seed)


class Recording(LocalClient):
    """Counts what it is asked, and loses the session of a step as often as told."""

    def __init__(self, environment: type[Environment] = Counting, lose: int = 0) -> None:
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


class Thinker(Answerer):
    """Answers by the text of the prompt, with a thought of its own."""

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []

    async def answer(self, prompt: Prompt, *, temperature: float, max_tokens: int, seed: int) -> Sample:
        self.prompts.append(prompt)
        return Sample([1, 2], [], (), "<think>More.</think><action>up</action>", finished=True)


async def test_an_episode_of_a_model_that_is_given_texts(config: Config) -> None:
    client, model = Recording(), Thinker()
    config = config.model_copy(update={"prompt": PromptConfig(template="think")})
    prompts = PromptBuilder(config.prompt, load_tokenizer(config.model.path), 1000)
    prompts._begun = "<think>"  # what a chat template may begin is in the answer already
    try:
        trajectory = await play(ticket(index=1), client, model, prompts, config)
    finally:
        await client.close()
    assert trajectory.won
    assert client.actions == ["up"] * 3
    assert all(step.valid for step in trajectory.steps)
    assert [prompt.text for prompt in model.prompts] == [step.prompt for step in trajectory.steps]
    assert "Action 1: 'up'" in model.prompts[1].text


async def test_the_step_limit_truncates(config: Config) -> None:
    trajectory = await play_with(config, Recording(), ticket(index=40))
    assert len(trajectory.steps) == 12
    assert trajectory.steps[-1].truncated
    assert not trajectory.steps[-1].terminated
    assert not trajectory.won
    # The state that the last action led to: one that others may have acted in.
    actions = [step.action for step in trajectory.steps]
    count = actions.count("up") - actions.count("down")
    met = {step.observation: step.anchor for step in trajectory.steps}
    final = f"The count is {count}, the target is 42."
    assert {final: trajectory.final_anchor}.items() <= met.items() or final not in met
    assert trajectory.final_anchor not in [anchor for text, anchor in met.items() if text != final]
    assert trajectory.final_anchor is not None


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
    monkeypatch.setattr(episode, "BACKOFF", Backoff(0.001, 5.0))
    client = Recording(lose=2)
    trajectory = await play_with(config, client, ticket())
    assert client.resets == client.closes == 3
    assert trajectory.won
    assert client.actions[2:] == [step.action for step in trajectory.steps]


async def test_a_session_that_is_always_lost_fails(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episode, "BACKOFF", Backoff(0.001, 5.0))
    client = Recording(lose=100)
    with pytest.raises(EpisodeFailed, match="lost the session 6 times: the server was restarted"):
        await play_with(config, client, ticket())
    assert client.resets == client.closes == 6


class Killed(Recording):
    """Loses the session at one action of step 2: the first that it is asked for."""

    killer: str | None = None

    async def step(self, session: str, step: int, action: str) -> StepResult:
        self.killer = self.killer or (action if step == 2 else None)
        if step == 2 and action == self.killer:
            raise SessionLost("the server closed the connection")
        return await super().step(session, step, action)


async def test_an_action_that_ends_its_environment_is_an_invalid_end(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(episode, "BACKOFF", Backoff(0.001, 5.0))
    client = Killed()
    trajectory = await play_with(config, client, ticket())
    first, last = trajectory.steps
    assert (first.valid, first.terminated) == (True, False)
    assert (last.action, last.reward, last.valid, last.terminated) == (client.killer, 0.0, False, True)
    assert trajectory.facts["won"] is False
    assert trajectory.final_anchor is None
    assert decode(encode(trajectory)).facts == trajectory.facts
    assert client.resets == client.closes == episode.LOSSES + 2


class Crashing(Counting):
    """Raises at `down` in a state other than the first; `always`: at any action there."""

    always = False

    def step(self, action: str) -> Observation:
        if self.value and (self.always or action == "down"):
            raise RuntimeError("a bug")
        return super().step(action)


class CrashingAlways(Crashing):
    always = True


@pytest.mark.parametrize("over_http", [False, True])
async def test_an_action_at_which_the_environment_fails_is_an_invalid_end(
    config: Config, tmp_path: Path, over_http: bool
) -> None:
    """A server answers 500 then. A failed ticket would be played with the same seed, and fail in the same way."""
    engine = Saying(config.model.path)
    engine.texts = [" up", " down"] * episode.LOSSES
    if not over_http:
        played = await play_with(config, Recording(Crashing), ticket(index=9), engine)
    else:
        with launch(tmp_path / "ready", "tests.actors.test_episode:Crashing") as server:
            client = open_client(server.url)
            played = await play_with(config, client, ticket(index=9), engine)  # type: ignore[arg-type]
    first, last = played.steps
    assert (first.action, first.valid, first.terminated) == ("up", True, False)
    assert (last.action, last.reward, last.valid, last.terminated) == ("down", 0.0, False, True)
    assert played.facts["won"] is False
    assert engine.texts == []


async def test_an_environment_that_fails_at_every_action_fails_the_ticket(config: Config) -> None:
    engine = Saying(config.model.path)
    engine.texts = [" up", " down"] * episode.LOSSES
    client = Recording(CrashingAlways)
    with pytest.raises(RequestRejected, match="the environment failed at step 2: RuntimeError"):
        await play_with(config, client, ticket(index=9), engine)
    assert client.resets == client.closes == episode.LOSSES + 1


class Vanishing(Recording):
    """Hangs at `up` in step 2; then no server is usable for the next `outage` resets."""

    outage = 1
    away = 0

    async def reset(self, request):  # type: ignore[no-untyped-def]
        if self.away:
            self.away -= 1
            raise EnvironmentUnavailableError("nobody listens")
        return await super().reset(request)

    async def step(self, session: str, step: int, action: str) -> StepResult:
        if step == 2 and action == "up":
            self.away = self.outage
            raise SessionLost("no answer within 30 s")
        return await super().step(session, step, action)


@pytest.mark.parametrize("outage", [1, episode.WAITS])
async def test_an_action_that_hangs_its_server_is_an_invalid_end(
    config: Config, monkeypatch: pytest.MonkeyPatch, outage: int
) -> None:
    """Somebody restarts the server. A ticket that was given back instead would hang it again, for ever."""
    monkeypatch.setattr(episode, "BACKOFF", Backoff(0.001, 5.0))
    client, engine = Vanishing(), Saying(config.model.path)
    client.outage = outage
    engine.texts = [" up", " up"] * episode.LOSSES
    played = await play_with(config, client, ticket(index=9), engine)
    assert [step.valid for step in played.steps] == [True, False]
    assert (played.steps[-1].terminated, played.facts["won"]) == (True, False)


async def test_a_server_that_an_action_takes_away_costs_an_attempt_and_an_outage_before_it_none(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(episode, "BACKOFF", Backoff(0.001, 5.0))
    client, engine = Vanishing(), Saying(config.model.path)
    client.outage = episode.WAITS + 1
    engine.texts = [" up", " up"]
    with pytest.raises(EpisodeFailed, match="unavailable at the action of step 2: nobody listens"):
        await play_with(config, client, ticket(), engine)
    client.away = 1
    with pytest.raises(EnvironmentUnavailableError):
        await play_with(config, client, ticket(), engine)


async def test_a_task_that_cannot_be_played_is_told(config: Config) -> None:
    with pytest.raises(RequestRejected, match="damaged"):
        await play_with(config, Recording(), ticket(index=0, split="broken"))


class Free(Environment):
    """Ends with step 3 of an action that is a number, with that reward, and takes no other action."""

    name = "counting"
    told: ClassVar[dict[str, object]] = {}

    @classmethod
    def splits(cls) -> dict[str, int]:
        return {"train": 5}

    def reset(self, split: str, index: int, *, expert: bool = False) -> Observation:
        self.taken = 0
        return Observation("go", facts={"goal": "win"})

    def step(self, action: str) -> Observation:
        self.taken += 1
        try:
            reward = float(action)
        except ValueError:
            return Observation(f"not a number: {action}", accepted=False)
        return Observation("on", reward, terminated=self.taken == 3, facts=self.told)


class Saying(ScriptedEngine):
    """Says what it is told, in turn."""

    texts: list[str]

    async def generate(self, prompt_ids: Sequence[int], *, temperature: float, max_tokens: int, seed: int) -> Sample:
        said = await super().generate(prompt_ids, temperature=temperature, max_tokens=max_tokens, seed=seed)
        return replace(said, text=self.texts.pop(0))


async def say(config: Config, texts: list[str], environment: type[Environment] = Free) -> Trajectory:
    engine = Saying(config.model.path)
    engine.texts = texts
    return await play_with(config, Recording(environment), ticket(index=0), engine)


@pytest.mark.parametrize(
    ("rewards", "won_at", "told", "won"),
    [
        (["0", "0", "1"], None, {}, True),
        (["0", "0", "0.01"], None, {}, True),
        (["5", "5", "0"], None, {}, False),
        (["0", "0", "-1"], None, {}, False),
        (["0", "0", "0.9"], 1.0, {}, False),
        (["-9", "0", "1"], 1.0, {}, True),
        (["0", "0", "0"], 0.0, {}, True),
        (["0", "0", "1"], None, {"won": False}, False),
        (["0", "0", "0"], None, {"won": True}, True),
    ],
)
async def test_success_where_the_environment_does_not_tell(
    config: Config, rewards: list[str], won_at: float | None, told: dict[str, object], won: bool
) -> None:
    class Told(Free):
        pass

    Told.told = told
    config = config.model_copy(update={"env": config.env.model_copy(update={"won_at": won_at})})
    played = await say(config, [f" {reward}" for reward in rewards], Told)
    assert played.won is won
    assert played.facts["won"] is won


async def test_an_episode_that_was_cut_off_is_not_won(config: Config) -> None:
    config = config.model_copy(update={"env": config.env.model_copy(update={"max_steps": 2})})
    assert not (await say(config, [" 0", " 7"])).won


async def test_a_refused_action_is_an_invalid_step(config: Config) -> None:
    config = config.model_copy(update={"env": config.env.model_copy(update={"max_steps": 4})})
    played = await say(config, [" 0", " " + "9" * (MAX_ACTION_CHARS + 1), " Fly\n{", " \ud800"])
    assert [step.valid for step in played.steps] == [True, False, False, False]
    assert [step.reward for step in played.steps] == [0.0] * 4
    assert played.steps[-1].truncated is True
    assert played.steps[2].observation.startswith("The action was not accepted: ")
    assert played.steps[2].action == "Fly\n{"
    assert not played.won


async def test_the_action_has_the_form_that_the_environment_wants(config: Config) -> None:
    class Lower(Free):
        action_form = "lower_case"

    texts = [" A  b", " 0", " 0", " 0"]
    assert (await say(config, texts[:], Lower)).steps[0].action == "a b"
    assert (await say(config, texts[:])).steps[0].action == "A  b"
    plain = config.model_copy(update={"env": config.env.model_copy(update={"action_form": "one_line"})})
    assert (await say(plain, texts[:], Lower)).steps[0].action == "A b"


class Over(Counting):
    """Ends before it begins."""

    def reset(self, split: str, index: int, *, expert: bool = False) -> Observation:
        return Observation("over", terminated=True)


async def test_an_episode_without_a_step_fails(config: Config) -> None:
    client = Recording(Over)
    with pytest.raises(EpisodeFailed, match="before the first action"):
        await play_with(config, client, ticket())
    assert client.closes == 1


class Rewarding(Counting):
    """Ends with its first action, for the largest reward there is."""

    def step(self, action: str) -> Observation:
        return Observation(text="over", reward=1e308, terminated=True, facts={"won": True}, state="over")


async def test_a_reward_that_becomes_infinite_when_scaled_fails_the_ticket_by_name(config: Config) -> None:
    with pytest.raises(EpisodeFailed, match=r"environment \w+ gave the reward 1e\+308; times env.success_reward=10"):
        await play_with(config, Recording(Rewarding), ticket())


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
async def test_a_log_probability_that_is_no_number_fails_the_ticket(config: Config, value: float) -> None:
    class Numberless(ScriptedEngine):
        async def generate(self, prompt_ids, **settings):  # type: ignore[no-untyped-def]
            sample = await super().generate(prompt_ids, **settings)
            return replace(sample, logprobs=[*sample.logprobs[:-1], value])

    with pytest.raises(EpisodeFailed, match=f"log-probability {value} .* policy version 3"):
        await play_with(config, Recording(), ticket(), Numberless(config.model.path))


async def test_malformed_calls_of_a_real_tool_server_are_steps(config: Config, tmp_path: Path) -> None:
    try:
        python = str(python_with_openenv("0.10"))
    except NoOpenEnv as error:
        pytest.skip(str(error))
    server = Path(__file__).parents[1] / "env_servers" / "openenv" / "echo_server.py"
    ready = tmp_path / "ready"
    config = config.model_copy(update={"env": config.env.model_copy(update={"max_steps": 5})})
    engine = Saying(config.model.path)
    engine.texts = [" echo_message[<b>A  b</b>]", " echo_message[", " shout[x]", ' echo_message[{"a": 1}]', " {nothing"]
    with start_server([python, str(server), "tools", "--ready-file", str(ready)], ready, timeout_s=120) as process:
        client = open_client(f"openenv+{process.url}")
        played = await play_with(config, client, ticket(), engine)  # type: ignore[arg-type]
    assert [step.valid for step in played.steps] == [True, False, False, True, False]
    assert played.steps[1].observation == "<b>A  b</b>"
    assert "must be tool[argument]" in played.steps[2].observation
    assert "no tool 'shout'" in played.steps[3].observation
    assert played.steps[4].observation == '{"a": 1}'
    assert (played.steps[-1].truncated, played.reward, played.won) == (True, 0.0, False)
