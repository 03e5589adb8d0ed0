"""The rollout actor with real Redis, weight channel and counting environment; the engine is scripted."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from actors import rollout_actor, weights
from actors.engine.interface import EngineFailed
from actors.players import TemplatePlayer
from actors.prompts import PromptBuilder, load_tokenizer
from actors.replicas import Replicas
from actors.rollout_actor import Rollout
from env_servers.client import EnvironmentClient, EnvironmentUnavailableError
from env_servers.clients.http import HttpClient
from env_servers.clients.local import LocalClient
from env_servers.environment import Observation
from env_servers.protocol import ResetRequest, StepResult
from services.backoff import Patience
from services.buffer import Buffer, Stored
from services.config.tree import Config
from services.schemas import TRAIN_STREAM, Task, Ticket, Trajectory
from services.weights import WeightChannel, open_channel
from tests.actors.scripted_engine import ScriptedEngine
from tests.env_servers.counting import Counting
from tests.env_servers.launching import launch

SIZE = 3
SHORT_LEASES: dict[str, object] = {"lease_s": 1.5}
"""For tests of their renewal, which happens every half second: two may be late. Elsewhere a lease outlasts the test."""


@dataclass
class Scene:
    """One actor and what surrounds it."""

    config: Config
    buffer: Buffer
    engine: ScriptedEngine
    channel: WeightChannel
    client: EnvironmentClient = field(default_factory=lambda: LocalClient(Counting))
    rollout: Rollout = field(init=False)
    environments: dict[str, EnvironmentClient] = field(init=False)

    def __post_init__(self) -> None:
        prompts = PromptBuilder(self.config.prompt, load_tokenizer(self.config.model.path), 200)
        self.environments = {"counting": self.client}
        self.rollout = Rollout(
            "actor-1",
            self.config,
            engine=self.engine,
            environments=self.environments,
            player=lambda sampler: TemplatePlayer("actor-1", self.config, self.environments, sampler, prompts),
            buffer=self.buffer,
            channel=self.channel,
        )

    @asynccontextmanager
    async def playing(self) -> AsyncIterator[asyncio.Task[None]]:
        run = asyncio.create_task(self.rollout.run())
        try:
            yield run
            await self.rollout.drain()
            await run
        finally:
            run.cancel()

    def publish(self, version: int) -> None:
        self.channel.publish(version, {"weight": torch.zeros(4)})


def group(number: int, *, split: str = "train") -> list[Ticket]:
    task = Task(env="counting", split=split, index=number % 3 if split == "train" else 0)
    return [Ticket(group=number, member=m, group_size=SIZE, task=task, seed=100 * number + m) for m in range(SIZE)]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(300):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110 - any condition at all
            await asyncio.sleep(0.01)


MakeScene = Callable[..., Scene]


@pytest.fixture
def make(config: Config, redis_url: str) -> MakeScene:
    def scene(**changes: dict[str, object]) -> Scene:
        merged = {name: getattr(config, name).model_dump() | update for name, update in changes.items()}
        changed = Config.model_validate(config.model_dump() | merged)
        buffer = Buffer.connect(redis_url, changed.run.name, changed.buffer, max_attempts=2)
        channel = open_channel(changed.weights, changed.run.name, changed.run.folder)
        return Scene(changed, buffer, ScriptedEngine(changed.model.path), channel)

    return scene


async def test_all_tickets_of_all_groups_are_played_with_the_newest_weights(make: MakeScene) -> None:
    scene = make()
    scene.publish(0)
    scene.publish(4)
    scene.buffer.issue([ticket for number in range(4) for ticket in group(number)])
    async with scene.playing():
        await until(lambda: scene.buffer.complete(TRAIN_STREAM) == [0, 1, 2, 3])
        await until(lambda: scene.buffer.actors().get("actor-1", {}).get("stored") == 4 * SIZE)
        seen = scene.buffer.actors()["actor-1"]
        assert (seen["state"], seen["version"], seen["episodes"], seen["failed"]) == ("playing", 4, 0, 0)
    assert scene.engine.loads == [(4, 0)]
    assert scene.engine.stopped
    for number in range(4):
        played = scene.buffer.read(TRAIN_STREAM, number)
        assert [trajectory.ticket for trajectory in played] == group(number)
        assert {span.version for t in played for step in t.steps for span in step.versions} == {4}
        assert all(trajectory.won and trajectory.actor == "actor-1" for trajectory in played)


async def test_the_initial_version_is_played_without_loading_it(make: MakeScene) -> None:
    """Every engine starts with the weights of `model.path`. One that has others by now loads them again."""
    scene = make()
    scene.channel.announce_initial()
    scene.buffer.issue(group(0))
    async with scene.playing():
        await until(lambda: scene.buffer.complete(TRAIN_STREAM) == [0])
        assert scene.engine.loads == []
        scene.publish(1)
        await until(lambda: scene.engine.loads == [(1, 0)])
        scene.channel.announce_initial()
        await until(lambda: scene.engine.loads == [(1, 0), (0, 0)])
    played = scene.buffer.read(TRAIN_STREAM, 0)
    assert {span.version for t in played for step in t.steps for span in step.versions} == {0}


async def test_a_ticket_is_played_with_the_version_announced_before_it_was_leased(
    make: MakeScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make()
    scene.publish(0)
    monkeypatch.setattr(weights, "LOOKS", Patience(600.0, 600.0))
    async with scene.playing():
        await until(lambda: scene.buffer.actors().get("actor-1", {}).get("state") == "playing")
        scene.publish(1)
        scene.buffer.issue(group(0))
        await until(lambda: scene.buffer.complete(TRAIN_STREAM) == [0])
    played = scene.buffer.read(TRAIN_STREAM, 0)
    assert {span.version for t in played for step in t.steps for span in step.versions} == {1}


async def test_nothing_is_sampled_before_the_first_version(make: MakeScene) -> None:
    scene = make()
    scene.buffer.issue(group(0))
    async with scene.playing():
        await until(lambda: scene.buffer.actors().get("actor-1", {}).get("state") == "waiting for weights")
        assert scene.buffer.stats().queued == SIZE
        scene.publish(0)
        await until(lambda: scene.buffer.complete(TRAIN_STREAM) == [0])
    assert scene.engine.loads == [(0, 0)]


async def test_a_lease_that_ran_out_elsewhere_is_played_here(make: MakeScene) -> None:
    scene = make()
    scene.publish(0)
    scene.buffer.issue(group(0))
    assert len(scene.buffer.lease("dead-actor", SIZE, lease_s=0.01)) == SIZE
    async with scene.playing():
        await until(scene.buffer.expire)  # the run's supervisor does it
        await until(lambda: scene.buffer.complete(TRAIN_STREAM) == [0])


async def test_leases_are_kept_as_long_as_an_episode_takes(make: MakeScene) -> None:
    scene = make(rollout=SHORT_LEASES)
    scene.publish(0)
    scene.buffer.issue(group(0))
    scene.engine.answering.clear()
    async with scene.playing():
        await until(lambda: len(scene.engine.seeds) == SIZE)
        await asyncio.sleep(2 * scene.config.rollout.lease_s)
        assert scene.buffer.expire() == 0
        assert scene.buffer.stats().leased == SIZE
        scene.engine.answering.set()
        await until(lambda: scene.buffer.complete(TRAIN_STREAM) == [0])


async def test_leases_are_kept_while_their_tickets_wait_for_weights(
    make: MakeScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make(rollout=SHORT_LEASES)
    monkeypatch.setattr(weights, "LOOKS", Patience(600.0, 600.0))
    scene.publish(0)
    async with scene.playing():
        await until(lambda: scene.rollout.status()["state"] == "playing")
        scene.engine.loading.clear()
        scene.publish(1)
        scene.buffer.issue([*group(0), *group(1)])
        await until(lambda: scene.buffer.stats().leased)
        await asyncio.sleep(2 * scene.config.rollout.lease_s)
        assert scene.buffer.expire() == 0
        scene.buffer.cancel(TRAIN_STREAM, 0, "for the test")
        await until(lambda: scene.rollout.status()["abandoned"] == SIZE)
        scene.engine.loading.set()
        await until(lambda: scene.rollout.status()["stored"] == SIZE)
    assert scene.buffer.complete(TRAIN_STREAM) == [1]
    assert scene.rollout.status()["stored"] == SIZE  # the cancelled ones were not begun


async def test_an_episode_whose_lease_is_lost_is_abandoned(make: MakeScene) -> None:
    scene = make(rollout=SHORT_LEASES)
    scene.publish(0)
    scene.buffer.issue(group(0))
    scene.engine.answering.clear()
    async with scene.playing():
        await until(lambda: len(scene.engine.seeds) == SIZE)
        scene.buffer.cancel(TRAIN_STREAM, 0, "for the test")
        await until(lambda: scene.rollout.status()["abandoned"] == SIZE)
        assert scene.rollout.status()["episodes"] == 0
        scene.engine.answering.set()
        scene.buffer.issue(group(1))
        await until(lambda: scene.buffer.complete(TRAIN_STREAM) == [1])
    assert scene.buffer.cancelled(TRAIN_STREAM) == {0: "for the test"}


async def test_an_episode_that_is_being_stored_is_not_abandoned(make: MakeScene) -> None:
    """Its ticket is settled already; a renewal that comes before the actor knows finds no lease."""
    scene = make(rollout=SHORT_LEASES)
    scene.publish(0)
    scene.buffer.issue(group(0))
    store, renew = scene.buffer.store, scene.buffer.renew
    renewed = threading.Semaphore(0)

    def slow(trajectory: Trajectory) -> Stored:
        stored = store(trajectory)
        for _ in range(2 * SIZE):
            assert renewed.acquire(timeout=30)
        return stored

    def told(actor: str, tickets: Sequence[str], lease_s: float) -> list[str]:
        lost = renew(actor, tickets, lease_s)
        renewed.release(2 * SIZE)
        return lost

    scene.buffer.store, scene.buffer.renew = slow, told  # type: ignore[method-assign]
    async with scene.playing():
        await until(lambda: scene.rollout.status()["stored"] == SIZE)
        assert scene.rollout.status()["abandoned"] == 0


async def test_an_ended_episode_makes_room_at_once_whatever_the_others_do(
    make: MakeScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One episode hangs in its first step; the other places are used by one group after another."""
    monkeypatch.setattr(rollout_actor, "LOOKS", Patience(600.0, 600.0))

    class FirstHangs(LocalClient):
        hanging: str | None = None

        async def step(self, session: str, step: int, action: str) -> StepResult:
            self.hanging = self.hanging or session
            if session == self.hanging:
                await asyncio.Event().wait()
            return await super().step(session, step, action)

    scene = make(rollout={"episodes_in_flight": SIZE})
    scene.environments["counting"] = FirstHangs(Counting)
    scene.publish(0)
    scene.buffer.issue([ticket for number in range(5) for ticket in group(number)])
    async with scene.playing():
        await until(lambda: len(scene.buffer.complete(TRAIN_STREAM)) == 4)
        # The last episode is stored a moment before it is none of the actor's any more.
        await until(lambda: scene.rollout.status()["episodes"] == 1)


async def test_a_task_that_cannot_be_played_cancels_its_group_alone(make: MakeScene) -> None:
    scene = make()
    scene.publish(0)
    scene.buffer.issue([*group(0, split="broken"), *group(1)])
    async with scene.playing():
        await until(lambda: scene.buffer.complete(TRAIN_STREAM) == [1])
        await until(lambda: scene.buffer.cancelled(TRAIN_STREAM))
    assert "damaged" in scene.buffer.cancelled(TRAIN_STREAM)[0]


class Numberless(Counting):
    """Some of its tasks give a score that is none."""

    def step(self, action: str) -> Observation:
        seen = super().step(action)
        facts = {**seen.facts, "score": math.nan} if self.numberless else seen.facts
        return replace(seen, facts=facts)

    def reset(self, split: str, index: int, *, expert: bool = False) -> Observation:
        self.numberless = index == 1
        return super().reset(split, index, expert=expert)


async def test_a_wrong_value_cancels_its_group_alone_and_says_which_it_was(make: MakeScene) -> None:
    scene = make()
    scene.client = LocalClient(Numberless)
    scene.__post_init__()
    scene.publish(0)
    scene.buffer.issue([ticket for number in range(3) for ticket in group(number)])
    async with scene.playing():
        await until(lambda: scene.buffer.cancelled(TRAIN_STREAM) and len(scene.buffer.complete(TRAIN_STREAM)) == 2)
    assert scene.buffer.complete(TRAIN_STREAM) == [0, 2]
    assert "facts.score is nan" in scene.buffer.cancelled(TRAIN_STREAM)[1]


async def test_an_episode_that_takes_too_long_fails(make: MakeScene) -> None:
    scene = make(rollout={"episode_timeout_s": 0.05})
    scene.publish(0)
    scene.buffer.issue(group(0))
    scene.engine.answering.clear()
    async with scene.playing():
        await until(lambda: scene.buffer.cancelled(TRAIN_STREAM))
    assert "longer than 0.05 s" in scene.buffer.cancelled(TRAIN_STREAM)[0]


async def ends_with(
    scene: Scene, message: str, meanwhile: Callable[[asyncio.Task[None]], Awaitable[None]] | None = None
) -> None:
    run = asyncio.create_task(scene.rollout.run())
    if meanwhile is not None:
        await meanwhile(run)
    with pytest.raises(EngineFailed, match=message):
        await asyncio.wait_for(run, 300)
    assert scene.engine.stopped
    stats = scene.buffer.stats()
    assert (stats.queued, stats.leased) == (SIZE, 0)


async def test_a_broken_engine_ends_the_actor_and_gives_the_tickets_back(make: MakeScene) -> None:
    scene = make()
    scene.publish(0)
    scene.buffer.issue(group(0))
    scene.engine.broken = True
    await ends_with(scene, "engine is broken")


async def test_weights_that_cannot_be_had_end_the_actor(make: MakeScene) -> None:
    scene = make()
    scene.publish(0)
    scene.buffer.issue(group(0))
    scene.engine.answering.clear()

    async def damage(run: asyncio.Task[None]) -> None:
        await until(lambda: len(scene.engine.seeds) == SIZE)
        version = 0
        while not run.done():
            version += 1
            scene.publish(version)
            for path in (scene.config.run.folder / "weights").glob("*.safetensors"):
                path.write_bytes(b"x" + path.read_bytes()[1:])
            await asyncio.wait([run], timeout=2)

    await ends_with(scene, "newest policy version is unavailable", damage)


async def test_an_engine_that_hangs_in_an_update_ends_the_actor(make: MakeScene) -> None:
    scene = make(weights={"timeout_s": 0.5})
    scene.publish(0)
    scene.buffer.issue(group(0))
    scene.engine.answering.clear()

    async def hang(run: asyncio.Task[None]) -> None:
        await until(lambda: len(scene.engine.seeds) == SIZE)
        scene.engine.hangs = True
        scene.publish(1)

    await ends_with(scene, r"longer than 0\.5 s to load version 1", hang)


async def test_tickets_go_back_while_no_environment_server_can_be_used(
    make: MakeScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_actor, "UNAVAILABLE_DELAY_S", 0.05)
    scene = make()

    class Away(LocalClient):
        away = True

        async def reset(self, request: ResetRequest) -> StepResult:
            if self.away:
                raise EnvironmentUnavailableError("nobody listens")
            return await super().reset(request)

    scene.client = Away(Counting)
    scene.__post_init__()
    scene.publish(0)
    scene.buffer.issue(group(0))
    async with scene.playing():
        await until(lambda: scene.rollout.status()["returned"] > 4 * SIZE)  # more than the attempts a ticket has
        scene.client.away = False
        await until(lambda: scene.buffer.complete(TRAIN_STREAM) == [0])
    assert scene.rollout.status()["failed"] == 0


async def test_an_action_that_hangs_its_server_does_not_stall_the_run(make: MakeScene, tmp_path: Path) -> None:
    """Its ticket has the same seed each time. The other episodes of the server only lose time."""
    scene = make()
    with launch(tmp_path / "ready", "tests.env_servers.counting:Stuck") as server:
        scene.client = Replicas([HttpClient(server.url, timeout_s=0.7, patience_s=0.1)])
        scene.__post_init__()
        scene.publish(0)
        task = Task(env="counting", split="train", index=1)
        scene.buffer.issue([*group(0), Ticket(group=1, member=0, group_size=1, task=task, seed=101), *group(2)])
        async with scene.playing():
            await until(lambda: scene.buffer.complete(TRAIN_STREAM) == [0, 1, 2])
    (stuck,) = scene.buffer.read(TRAIN_STREAM, 1)
    assert (stuck.steps[-1].action, stuck.steps[-1].valid, stuck.steps[-1].terminated) == ("up", False, True)
    assert not stuck.won
    assert all(trajectory.won for number in (0, 2) for trajectory in scene.buffer.read(TRAIN_STREAM, number))


async def test_draining_gives_the_tickets_back_at_once(make: MakeScene) -> None:
    scene = make()
    scene.publish(0)
    scene.buffer.issue(group(0))
    scene.engine.answering.clear()
    async with scene.playing() as run:
        await until(lambda: len(scene.engine.seeds) == SIZE)
        await scene.rollout.drain()
        assert scene.buffer.stats().queued == SIZE
        await run
    assert scene.buffer.stats().leased == 0
    assert scene.engine.stopped


@pytest.mark.parametrize("ticks", range(6))
async def test_an_end_that_meets_new_room_is_not_missed(
    make: MakeScene, monkeypatch: pytest.MonkeyPatch, ticks: int
) -> None:
    monkeypatch.setattr(rollout_actor, "LOOKS", Patience(600.0, 600.0))
    scene = make()
    scene.publish(0)
    async with asyncio.timeout(30), scene.playing():
        await until(lambda: scene.rollout._room._waiters)  # type: ignore[attr-defined]
        scene.rollout._ended.set()
        for _ in range(ticks):
            await asyncio.sleep(0)
        scene.rollout._room.set()


async def test_a_stopping_run_gives_its_tickets_back_and_can_go_on(make: MakeScene) -> None:
    scene = make()
    scene.publish(0)
    scene.buffer.issue(group(0))
    scene.engine.answering.clear()
    async with scene.playing():
        await until(lambda: len(scene.engine.seeds) == SIZE)
        scene.buffer.set_state("stopping")
        await until(lambda: scene.buffer.stats().queued == SIZE)
        scene.engine.answering.set()
        assert scene.rollout.status()["state"] == "stopping"
        scene.buffer.set_state("running")
        await until(lambda: scene.buffer.complete(TRAIN_STREAM) == [0])


@pytest.mark.parametrize("update", ["in_flight", "at_step", "at_episode"])
async def test_updates_wait_for_what_the_mode_says(make: MakeScene, update: str) -> None:
    scene = make(weights={"update": update})
    scene.publish(0)
    scene.buffer.issue(group(0))
    scene.engine.answering.clear()
    async with scene.playing():
        await until(lambda: len(scene.engine.seeds) == SIZE)
        scene.publish(1)
        if update == "in_flight":
            await until(lambda: (1, SIZE) in scene.engine.loads)
        else:
            await until(lambda: not (scene.rollout._weights.episodes.open and scene.rollout._weights.responses.open))
        scene.buffer.issue(group(1))
        scene.engine.answering.set()
        await until(lambda: scene.buffer.complete(TRAIN_STREAM) == [0, 1])
    versions = [
        sorted({span.version for step in trajectory.steps for span in step.versions})
        for number in (0, 1)
        for trajectory in scene.buffer.read(TRAIN_STREAM, number)
    ]
    if update == "in_flight":
        assert scene.engine.loads == [(0, 0), (1, SIZE)]
        assert versions == [[1]] * 2 * SIZE
    elif update == "at_step":
        assert scene.engine.loads == [(0, 0), (1, 0)]
        assert versions == [[0, 1]] * SIZE + [[1]] * SIZE
    else:
        assert scene.engine.loads == [(0, 0), (1, 0)]
        assert versions == [[0]] * SIZE + [[1]] * SIZE
