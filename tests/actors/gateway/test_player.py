"""Rollout actors whose tickets agents play: a real Redis and real processes; the sampler is told what to say."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from actors.engine.interface import EngineFailed, EngineStats, InferenceEngine, Sample
from actors.gateway.player import AgentPlayer
from actors.rollout_actor import Rollout
from env_servers.client import SessionLost
from env_servers.clients.local import LocalClient
from env_servers.protocol import StepResult
from services.buffer import Buffer
from services.config.tree import Config
from services.schemas import TRAIN_STREAM, Task, Ticket, Trajectory
from services.weights import open_channel
from tests.actors.gateway.families import tokenizer
from tests.actors.gateway.scene import TOKEN, Telling, agent_config
from tests.env_servers.counting import Counting

SIZE = 2
AGENT = """
import json, os, sys, time, urllib.error, urllib.request

def post(path, body):
    request = urllib.request.Request(
        os.environ["ANCHORAGE_URL"] + path,
        json.dumps(body).encode() if body is not None else None,
        {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read() or b"null")
    except urllib.error.HTTPError as error:
        return json.loads(error.read()) | {"done": True}

TOOL = {"type": "function", "function": {"name": "act", "parameters": {"type": "object"}}}

def ask(messages, **more):
    body = {"model": "policy", "messages": messages, "tools": [TOOL], **more}
    return post("/v1/chat/completions", body)

def play(limit=100):
    state = post("/episode", None)["state"]
    messages = [{"role": "user", "content": state["observation"]}]
    for _ in range(limit):
        answer = ask(messages)["choices"][0]["message"]
        call = answer["tool_calls"][0]
        action = json.loads(call["function"]["arguments"])["action"]
        state = post("/episode/step", {"action": action})
        if state["done"]:
            return
        messages += [answer, {"role": "tool", "tool_call_id": call["id"], "content": state["observation"]}]
"""


@dataclass
class ToldEngine(InferenceEngine):
    """An engine whose answers are a `Telling`'s."""

    sampler: Telling = field(default_factory=Telling)
    stopped: bool = False

    @property
    def version(self) -> int:
        return self.sampler.version

    async def start(self) -> None:
        """Nothing to load."""

    async def generate(
        self, prompt_ids: Sequence[int], *, temperature: float, max_tokens: int, seed: int, stop: Sequence[str] = ()
    ) -> Sample:
        return await self.sampler.generate(
            prompt_ids, temperature=temperature, max_tokens=max_tokens, seed=seed, stop=stop
        )

    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        self.sampler.version = version

    async def stop(self) -> None:
        self.stopped = True

    def stats(self) -> EngineStats:
        return EngineStats()


@dataclass
class Run:
    """One actor. `player` is its player, `client` its environment's."""

    config: Config
    buffer: Buffer
    engine: ToldEngine
    client: LocalClient
    rollout: Rollout
    player: AgentPlayer

    def played(self, number: int = 0) -> list[Trajectory]:
        return self.buffer.read(TRAIN_STREAM, number)

    async def complete(self, *numbers: int) -> None:
        await until(lambda: self.buffer.complete(TRAIN_STREAM) == [*numbers])

    async def cancelled(self) -> str:
        await until(lambda: self.buffer.cancelled(TRAIN_STREAM))
        return self.buffer.cancelled(TRAIN_STREAM)[0]


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(300):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110 - any condition at all
            await asyncio.sleep(0.01)


def group(number: int = 0, index: int = 0) -> list[Ticket]:
    task = Task(env="counting", split="train", index=index)
    return [Ticket(group=number, member=m, group_size=SIZE, task=task, seed=10 * number + m) for m in range(SIZE)]


Make = Callable[..., Any]


@pytest.fixture
def make(tmp_path: Path, redis_url: str, run_name: str) -> Make:
    """A playing actor whose agents run `AGENT` and this text."""

    @asynccontextmanager
    async def started(
        text: str = "play()",
        *,
        client: LocalClient | None = None,
        rollout: Mapping[str, Any] | None = None,
        **agent: Any,
    ) -> AsyncIterator[Run]:
        script = tmp_path / "agent.py"
        script.write_text(AGENT + text)
        if not agent.get("service"):
            agent = {"command": ["python", str(script)], **agent}
        settings = agent_config(tmp_path, **agent)
        tree = settings.config.model_dump()
        tree["run"]["name"] = run_name
        tree["rollout"] |= rollout or {}
        config = Config.model_validate(tree)
        buffer = Buffer.connect(redis_url, run_name, config.buffer, max_attempts=2)
        channel = open_channel(config.weights, run_name, config.run.folder)
        channel.publish(0, {"weight": torch.zeros(4)})
        engine, client = ToldEngine(), client or LocalClient(Counting)
        made: list[AgentPlayer] = []

        def of(sampler: Any) -> AgentPlayer:
            environments, words = {"counting": client}, tokenizer("chatml")
            made.append(AgentPlayer("actor-1", config, settings.agent, environments, sampler, words, TOKEN))
            return made[0]

        actor = Rollout(
            "actor-1",
            config,
            engine=engine,
            environments={"counting": client},
            player=of,
            buffer=buffer,
            channel=channel,
        )
        running = asyncio.create_task(actor.run())
        try:
            yield Run(config, buffer, engine, client, actor, made[0])
            await actor.drain()
            await running
        finally:
            running.cancel()
        assert made[0]._launcher is None or made[0]._launcher.alive == 0
        assert len(made[0]._gateway.keys) == 0

    return started


async def test_agents_play_groups_to_their_ends(make: Make) -> None:
    async with make() as run:
        run.buffer.issue([ticket for number in range(3) for ticket in group(number)])
        await run.complete(0, 1, 2)
        await until(lambda: run.rollout.status()["stored"] == 3 * SIZE)
        beat = run.rollout.status()
    for number in range(3):
        played = run.played(number)
        assert [trajectory.ticket for trajectory in played] == group(number)
        for trajectory in played:
            assert trajectory.won
            assert [step.reward for step in trajectory.steps] == [0.0, 10.0]
            assert [step.extends for step in trajectory.steps] == [-1, 0]
            assert trajectory.facts["agent"]["cause"] == "done"
            for step in trajectory.steps:
                assert step.prompt_ids.tolist() in run.engine.sampler.prompts
    assert beat["agents"]["extended_fraction"] == 1.0


@pytest.mark.parametrize(
    ("text", "cause", "code"),
    [
        ("play(1); sys.exit(3)", "crash", 3),
        ("play(1); raise ValueError('lost the thread')", "crash", 1),
        ("play(1); os.kill(os.getpid(), 9)", "crash", -9),
        ("play(1)", "gave_up", 0),
    ],
)
async def test_an_agent_that_stops_after_an_answer_is_stored_truncated(
    make: Make, text: str, cause: str, code: int
) -> None:
    async with make(text) as run:
        run.buffer.issue(group())
        await run.complete(0)
    for trajectory in run.played():
        (step,) = trajectory.steps
        assert (step.truncated, step.terminated, step.reward) == (True, False, 0.0)
        assert (trajectory.facts["agent"]["cause"], trajectory.facts["agent"]["exit"]) == (cause, code)


@pytest.mark.parametrize(
    ("text", "agent", "rollout", "cause"),
    [
        ("ask([{'role': 'user', 'content': 'x'}]); time.sleep(600)", {"idle_s": 8.0}, {}, "idle"),
        (
            "while True: ask([{'role': 'user', 'content': 'x'}]); time.sleep(0.05)",
            {},
            {"episode_timeout_s": 10.0},
            "timeout",
        ),
        ("while True: ask([{'role': 'user', 'content': 'x'}])", {"max_calls": 3}, {}, "max_calls"),
    ],
)
async def test_limits_end_an_episode_that_is_stored(
    make: Make, text: str, agent: dict[str, Any], rollout: dict[str, Any], cause: str
) -> None:
    async with make(text, rollout=rollout, **agent) as run:
        run.buffer.issue(group())
        await run.complete(0)
    for trajectory in run.played():
        assert trajectory.facts["agent"]["cause"] == cause
        assert trajectory.steps[-1].truncated


async def test_an_agent_that_ends_before_its_first_call_fails_with_its_last_words(make: Make) -> None:
    async with make("sys.exit('no browser on this machine')") as run:
        run.buffer.issue(group())
        reason = await run.cancelled()
    assert "before it had the answer of a call" in reason
    assert "no browser on this machine" in reason


async def test_crashes_can_be_failures(make: Make) -> None:
    async with make("play(1); sys.exit(3)", on_stop="fail") as run:
        run.buffer.issue(group())
        assert "the agent crashed (exit code 3)" in await run.cancelled()


async def test_an_agent_that_gives_up_costs_an_attempt(make: Make) -> None:
    async with make("play(1); post('/episode/fail', {'reason': 'no network'}); time.sleep(60)") as run:
        run.buffer.issue(group())
        assert "the agent gave up: no network" in await run.cancelled()


async def test_own_worlds_post_their_rewards(make: Make) -> None:
    text = "ask([{'role': 'user', 'content': 'x'}])\npost('/episode/observe', {'observation': 'y', 'reward': 0.5})"
    async with make(text, environment="own") as run:
        run.buffer.issue(group())
        await run.complete(0)
    assert [[step.reward for step in trajectory.steps] for trajectory in run.played()] == [[5.0]] * SIZE
    assert {trajectory.facts["agent"]["cause"] for trajectory in run.played()} == {"exit"}


async def test_an_own_world_without_a_reward_is_told_how_to_post_one(make: Make) -> None:
    async with make("ask([{'role': 'user', 'content': 'x'}])", environment="own") as run:
        run.buffer.issue(group())
        assert "/episode/end" in await run.cancelled()


class LosesOnce(LocalClient):
    """Loses the session of each episode's second step once."""

    lost = 0

    async def step(self, session: str, step: int, action: str) -> StepResult:
        if step == 2 and self.lost < SIZE:
            self.lost += 1
            raise SessionLost("the server was restarted")
        return await super().step(session, step, action)


async def test_a_lost_session_starts_the_agent_again_with_another_key(make: Make) -> None:
    client = LosesOnce(Counting)
    async with make(client=client) as run:
        run.buffer.issue(group())
        await run.complete(0)
        assert run.rollout.status()["failed"] == 0
    assert client.lost == SIZE
    assert all(trajectory.won and len(trajectory.steps) == 2 for trajectory in run.played())
    # Each is told once, by whichever episode is stored next.
    assert sum(int(str(trajectory.facts["agent"]["failures"])) for trajectory in run.played()) == SIZE  # type: ignore[index]


async def test_an_engine_that_fails_ends_the_actor_and_its_agents(make: Make) -> None:
    runs: list[Run] = []

    async def play() -> None:
        async with make() as run:
            runs.append(run)
            run.engine.sampler.error = EngineFailed("the engine is broken")
            run.buffer.issue(group())
            await until(lambda: run.rollout._ended.is_set())

    with pytest.raises(EngineFailed):
        await play()
    assert runs[0].buffer.stats().leased == 0


async def test_a_lease_that_is_lost_voids_the_key_and_ends_the_agent(make: Make) -> None:
    """The group is cancelled meanwhile: no process and no key of its agents is left."""
    async with make(rollout={"lease_s": 1.5}) as run:
        run.engine.sampler.open.clear()
        run.buffer.issue(group())
        await until(lambda: len(run.engine.sampler.prompts) == SIZE)
        pids = [process.pid for process in run.player._launcher._processes.values()]
        run.buffer.cancel(TRAIN_STREAM, 0, "for the test")
        await until(lambda: run.rollout.status()["abandoned"] == SIZE)
        await until(lambda: len(run.player._gateway.keys) == 0)
        await until(lambda: not any(psutil.pid_exists(pid) for pid in pids if pid))
        run.engine.sampler.open.set()
        run.buffer.issue(group(1))
        await run.complete(1)
    assert run.buffer.cancelled(TRAIN_STREAM) == {0: "for the test"}


SERVICE = """
run = os.environ["SERVICE_URL"], os.environ["SERVICE_TOKEN"]
while True:
    os.environ["ANCHORAGE_URL"], os.environ["OPENAI_API_KEY"] = run
    episode = post("/episodes/next", {"wait_s": 5})
    if episode:
        os.environ["ANCHORAGE_URL"] = episode["base_url"].removesuffix("/v1")
        os.environ["OPENAI_API_KEY"] = episode["api_key"]
        play()
"""


async def test_services_ask_for_episodes(make: Make, tmp_path: Path) -> None:
    async with make(service=True) as run:
        await until(lambda: run.rollout.status().get("agents"))
        script = tmp_path / "service.py"
        script.write_text(AGENT + SERVICE)
        url = run.rollout.status()["agents"]["gateway"]
        environment = {"SERVICE_URL": url, "SERVICE_TOKEN": TOKEN, "PATH": "/usr/bin:/bin"}
        run.buffer.issue([ticket for number in range(3) for ticket in group(number)])
        services = [
            await asyncio.create_subprocess_exec(sys.executable, str(script), env=environment) for _ in range(2)
        ]
        try:
            await run.complete(0, 1, 2)
        finally:
            for service in services:
                service.kill()
                await service.wait()
    assert all(trajectory.won for number in range(3) for trajectory in run.played(number))


async def test_an_episode_that_no_service_takes_goes_back_without_an_attempt(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.rollout_actor.UNAVAILABLE_DELAY_S", 0.1)
    async with make(service=True, offer_s=0.2) as run:
        await until(lambda: run.rollout.status().get("agents"))
        monkeypatch.setattr(run.player, "room", lambda free: free)  # as if services had left after it was leased
        run.buffer.issue(group())
        await until(lambda: run.rollout.status()["returned"] >= 3 * SIZE)
        assert run.rollout.status()["failed"] == 0
    assert run.buffer.cancelled(TRAIN_STREAM) == {}
