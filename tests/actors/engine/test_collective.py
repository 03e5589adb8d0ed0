"""A learner's version on its way to real vLLM engines by the collective path, over gloo.

Learner and engines are processes: the publisher has the part of learner rank 0, each engine an actor's.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.engine.process import EngineProcess
from actors.engine.weight_transfer import UpdateInfo, update_facts
from actors.weights import WeightFollower
from services.config.tree import BufferConfig, ModelConfig, RolloutConfig, WeightsConfig
from services.weights import open_channel
from services.weights.collective import CollectiveChannel, Incoming
from services.weights.coordination import Coordination
from services.weights.gloo import GlooReceiver
from services.weights.rendezvous import check_in
from services.weights.rounds import Request
from tests.actors.tiny import make_model, reference_logprobs, weights_of, write_model
from tests.waiting import until

CONFIG = WeightsConfig.model_validate({"channel": "gloo", "timeout_s": 60.0})
PROMPT = list(b"A prompt for engines that receive.")
ADAPTED = "model.layers.0.self_attn.q_proj.weight"


class GatheringCoordination(Coordination):
    """Shows requests to the publisher once there are `expected`: the members of a round must not depend on timing."""

    expected = 1

    def requests(self) -> list[Request]:
        requests = super().requests()
        return requests if len(requests) >= self.expected else []


class Publisher:
    """The channel as learner rank 0 has it."""

    def __init__(self, url: str, run: str) -> None:
        self.channel = CollectiveChannel(url, run, BufferConfig(), "gloo", CONFIG.timeout_s)
        self.channel._coordination.close()
        self._gathering = self.channel._coordination = GatheringCoordination(url, run, BufferConfig())

    def expect(self, readers: int) -> None:
        """Rounds are of at least so many readers from now on."""
        self._gathering.expected = readers

    def publish(self, version: int, tensors: dict[str, torch.Tensor], readers: int) -> None:
        """Publish for a round of so many readers."""
        self.expect(readers)
        self.channel.publish(version, tensors)


def receive_one_and_hang_in_the_next(url: str, run: str, pipe: Connection) -> None:
    """A receiver's process: it receives a version; of the next, for which it checks in, it receives nothing."""
    channel = open_channel(CONFIG, run, Path(), redis_url=url, reader="dying")
    assert isinstance(channel, CollectiveChannel)
    first = until(channel.latest)
    us = joined(channel.receive(first))
    receiver = GlooReceiver(us.membership, us.membership.first_rank, CONFIG.timeout_s)
    assert list(receiver.receive(UpdateInfo(**update_facts(us)).forms()))
    pipe.send("received")
    following = until(lambda: newest if (newest := channel.latest()) != first else None)
    joined(channel.receive(following))
    pipe.send("checked in")
    signal.pause()


def joined(incoming: Incoming) -> Incoming:
    us = incoming.membership
    check_in(us.host, us.check_in_port, us.first_rank, us.world, us.check_in_timeout_s)
    return incoming


class Actor:
    """An engine and what keeps it on the newest version."""

    def __init__(self, folder: Path, url: str, run: str, name: str) -> None:
        model = ModelConfig(path=folder, max_prompt_tokens=64, max_response_tokens=32)
        self.engine = EngineProcess(model, RolloutConfig(episodes_in_flight=4, kv_cache_mib=32))
        self.channel = open_channel(CONFIG, run, Path(), redis_url=url, reader=name)
        self.follower = WeightFollower(self.channel, self.engine, CONFIG)

    async def samples(self, version: int, model: Any) -> None:
        """What it samples has the log-probabilities of the model, and the version."""
        sample = await self.engine.generate(PROMPT, temperature=1.0, max_tokens=16, seed=version)
        wanted = reference_logprobs(model, PROMPT, sample.token_ids, 1.0)
        assert max(abs(a - b) for a, b in zip(sample.logprobs, wanted, strict=True)) < 1e-4
        assert [span.version for span in sample.versions] == [version]


@asynccontextmanager
async def started(*actors: Actor) -> AsyncIterator[None]:
    try:
        await asyncio.gather(*(actor.engine.start() for actor in actors))
        yield
    finally:
        await asyncio.gather(*(actor.engine.stop() for actor in actors))
        for actor in actors:
            actor.channel.close()


@pytest.fixture
def publisher(redis_url: str, run_name: str) -> Iterator[Publisher]:
    publisher = Publisher(redis_url, run_name)
    yield publisher
    publisher.channel.close()


def adapted(model: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Adapters of one weight, and the model with them."""
    generator = torch.Generator().manual_seed(5)
    rows, columns = model.state_dict()[ADAPTED].shape
    low = torch.randn(2, columns, generator=generator) * 0.3, torch.randn(rows, 2, generator=generator) * 0.3
    with torch.no_grad():
        model.state_dict()[ADAPTED].add_(low[1] @ low[0])
    return {f"{ADAPTED}.lora_A": low[0], f"{ADAPTED}.lora_B": low[1]}, model


async def test_engines_sample_with_what_was_sent_also_late_and_when_a_receiver_dies(
    publisher: Publisher, redis_url: str, run_name: str, tmp_path: Path
) -> None:
    """Two engines and a third that comes late. A receiver of their group is killed in the middle of a broadcast."""
    models = [make_model(seed, tied=False) for seed in (1, 2, 3)]
    folder = write_model(tmp_path / "model", models[0])
    here, there = multiprocessing.get_context("spawn").Pipe()
    dying = multiprocessing.get_context("spawn").Process(
        target=receive_one_and_hang_in_the_next, args=(redis_url, run_name, there), daemon=True
    )
    one, other, late = (Actor(folder, redis_url, run_name, name) for name in ("one", "other", "late"))
    async with started(one, other, late):
        publisher.channel.announce_initial()
        await asyncio.gather(one.follower.first(), other.follower.first())
        await one.samples(0, models[0])
        publisher.publish(1, weights_of(models[1]), readers=3)
        dying.start()
        await asyncio.gather(one.follower.catch_up(), other.follower.catch_up())
        for actor in (one, other):
            await actor.samples(1, models[1])

        assert await asyncio.to_thread(here.poll, CONFIG.timeout_s)
        assert here.recv() == "received"
        publisher.publish(2, weights_of(models[2]), readers=3)
        catching_up = asyncio.gather(one.follower.catch_up(), other.follower.catch_up())
        assert await asyncio.to_thread(here.poll, CONFIG.timeout_s)
        publisher.expect(1)
        assert dying.pid is not None
        os.kill(dying.pid, signal.SIGKILL)
        await catching_up
        for actor in (one, other):
            await actor.samples(2, models[2])

        await late.follower.first()
        await late.samples(2, models[2])
        adapter, whole = adapted(models[0])
        publisher.publish(3, adapter, readers=2)
        await asyncio.gather(late.follower.catch_up(), one.follower.catch_up())
        for actor in (late, one):
            await actor.samples(3, whole)
