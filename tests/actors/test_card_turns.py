"""The rollout actor's turns on a shared card: real Redis, weight channel and environment; the engine is scripted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import torch

from actors.card_turns import EpisodeLimits
from actors.engine.interface import EngineFailed
from actors.players import TemplatePlayer
from actors.prompts import PromptBuilder, load_tokenizer
from actors.rollout_actor import Rollout
from env_servers.clients.local import LocalClient
from services.buffer import Buffer
from services.buffer.card import Bid, Hold, Turn
from services.config.tree import Config
from services.schemas import TRAIN_STREAM, Task, Ticket
from services.weights import open_channel
from tests.actors.scripted_engine import ScriptedEngine
from tests.env_servers.counting import Counting

SIZE = 3
LEASE_S = 60.0


class Scene:
    """An actor, and the test in the learner's place."""

    def __init__(self, config: Config, redis_url: str, **rollout: object) -> None:
        tree = config.model_dump()
        tree["rollout"] |= {"share_gpus": "turns", **rollout}
        tree["learner"] |= {"zero_stage": 2}
        self.config = Config.model_validate(tree)
        self.buffer = Buffer.connect(redis_url, self.config.run.name, self.config.buffer, max_attempts=2)
        self.channel = open_channel(self.config.weights, self.config.run.name, self.config.run.folder)
        self.engine = ScriptedEngine(self.config.model.path)
        prompts = PromptBuilder(self.config.prompt, load_tokenizer(self.config.model.path), 200)
        clients = {"counting": LocalClient(Counting)}
        self.rollout = Rollout(
            "actor-1",
            self.config,
            engine=self.engine,
            environments=clients,
            player=lambda sampler: TemplatePlayer("actor-1", self.config, clients, sampler, prompts),
            buffer=self.buffer,
            channel=self.channel,
        )
        self.run = asyncio.create_task(self.rollout.run())

    def publish(self, version: int) -> None:
        self.channel.publish(version, {"weight": torch.zeros(4)})

    def phase(self) -> object:
        return self.rollout.status()["state"]

    def holder(self) -> str | None:
        state = self.buffer.card.state()
        return None if state is None else state.holder

    async def take(self) -> Turn:
        """Take the card as the learner does."""
        bid = Bid("learner", first=True)
        found: list[Turn] = []

        def ask() -> bool:
            turn = self.buffer.card.take(bid, LEASE_S)
            found.extend([] if turn is None else [turn])
            return bool(found)

        await until(ask)
        return found[0]

    async def end(self) -> None:
        await self.rollout.drain()
        await self.run


def group(number: int) -> list[Ticket]:
    task = Task(env="counting", split="train", index=number % 3)
    return [Ticket(group=number, member=m, group_size=SIZE, task=task, seed=100 * number + m) for m in range(SIZE)]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(120):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110 - any condition at all
            await asyncio.sleep(0.01)


async def test_a_turn_begins_with_the_newest_version_and_requests_in_flight_outlast_the_learners(
    config: Config, redis_url: str
) -> None:
    scene = Scene(config, redis_url, episode_timeout_s=30.0)
    scene.publish(0)
    scene.buffer.issue(group(0))
    scene.engine.answering.clear()
    await until(lambda: len(scene.engine.seeds) == SIZE)
    assert (scene.holder(), scene.phase()) == ("actor-1", "playing")

    turn = await scene.take()
    assert scene.engine.sleeps == [SIZE]
    assert scene.phase() == "asleep"
    limits = list(scene.rollout._limits._running)
    assert [limit.when() for limit in limits] == [None] * SIZE
    scene.engine.answering.set()
    scene.buffer.issue(group(1))  # not leased before the engine wakes
    scene.publish(1)
    await asyncio.to_thread(scene.rollout._buffer.renew, "actor-1", [], LEASE_S)
    assert scene.buffer.stats().leased == SIZE
    assert scene.buffer.card.renew(turn, LEASE_S, "updating") is Hold.HELD
    assert scene.engine.loads == [(0, 0)]

    scene.buffer.card.give(turn)
    await until(lambda: scene.buffer.complete(TRAIN_STREAM) == [0, 1])
    assert scene.engine.loads == [(0, 0), (1, SIZE)]
    for number in (0, 1):
        played = scene.buffer.read(TRAIN_STREAM, number)
        assert [trajectory.ticket for trajectory in played] == group(number)
        assert {span.version for t in played for step in t.steps for span in step.versions} == {1}
    await scene.end()
    assert scene.holder() is None


async def test_the_same_version_wakes_the_engine_too(config: Config, redis_url: str) -> None:
    """On a GPU a sleeping engine has lost its weights."""
    scene = Scene(config, redis_url)
    scene.publish(3)
    await until(lambda: scene.phase() == "playing")
    scene.buffer.card.give(await scene.take())
    await until(lambda: scene.engine.loads == [(3, 0), (3, 0)])
    await until(lambda: scene.phase() == "playing")
    await scene.end()


async def test_without_a_version_the_actor_asks_for_no_card(config: Config, redis_url: str) -> None:
    scene = Scene(config, redis_url)
    turn = await scene.take()
    assert scene.phase() == "waiting for weights"
    scene.publish(0)
    scene.buffer.card.give(turn)
    await until(lambda: scene.phase() == "playing")
    await scene.end()


async def test_what_the_channel_has_lost_the_learner_can_publish_again(config: Config, redis_url: str) -> None:
    """The actor gives the card back, although it has nothing to wake its engine with."""
    scene = Scene(config, redis_url)
    scene.publish(0)
    await until(lambda: scene.phase() == "playing")
    turn = await scene.take()
    latest, scene.channel.latest = scene.channel.latest, lambda: None  # type: ignore[method-assign]
    scene.buffer.card.give(turn)
    await until(lambda: scene.phase() == "waking")
    turn = await scene.take()
    scene.channel.latest = latest  # type: ignore[method-assign]
    scene.publish(1)
    scene.buffer.card.give(turn)
    await until(lambda: scene.phase() == "playing")
    assert scene.engine.loads == [(0, 0), (1, 0)]
    await scene.end()


async def test_an_actor_that_lost_its_turn_ends_with_its_engine(config: Config, redis_url: str) -> None:
    scene = Scene(config, redis_url)
    scene.publish(0)
    await until(lambda: scene.phase() == "playing")
    card = scene.buffer._keys["card"]
    scene.buffer._client.hset(card, "ends", 0)  # it stood still for its lease
    await until(lambda: scene.holder() == "learner" or scene.buffer.card.take(Bid("learner", first=True), LEASE_S))
    with pytest.raises(EngineFailed, match=r"another one has the card: no renewal within 60 s \(rollout\.lease_s\)"):
        await scene.run
    assert scene.engine.stopped
    assert scene.holder() == "learner"


@pytest.mark.parametrize("update", ["at_step", "at_episode"])
async def test_the_engine_falls_asleep_when_weights_update_allows(config: Config, redis_url: str, update: str) -> None:
    tree = config.model_dump()
    tree["weights"]["update"] = update
    scene = Scene(Config.model_validate(tree), redis_url)
    scene.publish(0)
    scene.buffer.issue([*group(0), *group(1)])
    scene.engine.answering.clear()
    await until(lambda: len(scene.engine.seeds) == 2 * SIZE)
    bid = Bid("learner", first=True)
    await until(lambda: scene.buffer.card.take(bid, LEASE_S) is None and scene.phase() == "parking")
    assert scene.engine.sleeps == []
    scene.engine.answering.set()
    await scene.take()
    assert scene.engine.sleeps == [0]
    if update == "at_episode":
        assert scene.buffer.complete(TRAIN_STREAM) == [0, 1]
    await scene.end()


async def test_limits_stand_still_while_they_are_stopped() -> None:
    limits, ended = EpisodeLimits(), []

    async def episode(seconds: float) -> None:
        try:
            async with limits.limit(seconds):
                await asyncio.Event().wait()
        except TimeoutError:
            ended.append(seconds)

    running = [asyncio.create_task(episode(seconds)) for seconds in (0.05, 300.0)]
    await asyncio.sleep(0)
    limits.stop()
    running.append(asyncio.create_task(episode(0.1)))  # begins while they stand still
    await asyncio.sleep(0.3)
    assert ended == []
    limits.go_on()
    async with asyncio.timeout(60):
        await asyncio.wait([running[0]])
        await asyncio.wait([running[2]])
    assert ended == [0.05, 0.1]
    running[1].cancel()
