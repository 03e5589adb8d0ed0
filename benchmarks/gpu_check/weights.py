"""Every weight channel, stage by stage, from a real rank to a real engine that has requests in flight.

Invariants
- The rank's weights change before each channel's transfer. What the engine samples afterwards must agree with the rank,
  and what it sampled before must not: else the transfer shows nothing.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, get_args

import numpy as np

from actors.engine.process import EngineProcess
from actors.weights import WeightFollower
from benchmarks.gpu_check.engine import IN_FLIGHT, Load, made_up_prompts, response_of
from benchmarks.gpu_check.models import folder_of
from benchmarks.gpu_check.rows import Row, at_least, at_most, failed, measured, skipped
from benchmarks.gpu_check.settings import CARD_NEEDED, Settings, cards
from benchmarks.parts import updates
from benchmarks.parts.cluster import cluster
from benchmarks.parts.transfer import EventLoop
from benchmarks.parts.weights import memcpy_gb_per_s
from learner.batching import Row as Response
from learner.prepare import prepare
from learner.publication import Publication
from learner.rank.group import RankGroup, start_ranks
from services.config.tree import Config, WeightsConfig
from services.errors import first_line
from services.redis_server import EmbeddedRedis
from services.weights import StoringChannel, WeightChannel, WeightsUnavailable, WeightVersion, open_channel

CHANNELS: tuple[str, ...] = get_args(WeightsConfig.model_fields["channel"].annotation)
SAMPLED = Load(64, 12, 12)
IN_THE_BACKGROUND = 8
ROUNDS = 3
POLL_S = 0.001
FLOOR = 1e-3
"""Nats: a smaller gap after a transfer is always allowed."""
LEFT = 0.2
"""Share of the gap before a transfer that may be left after it: rounding."""
RUN = "gpu-check"


@dataclass
class Stages:
    """Seconds of one channel's transfers from the call of the rank, one entry a transfer.

    Attributes:
        idle: until the rank may begin its next update.
        announced: until the version can be had; for channels that store it, verified in this node's memory.
        loaded: until the engine samples with it.
        stall: how late the event loop of the actor's process was, at most.
        still: of the engine's, in which it samples nothing, a transfer.
    """

    idle: list[float] = field(default_factory=list)
    announced: list[float] = field(default_factory=list)
    loaded: list[float] = field(default_factory=list)
    stall: float = 0.0
    still: float = 0.0


class Actor:
    """What a rollout actor does with weights, without episodes."""

    def __init__(self, settings: Settings, config: Config, redis_url: str, ranks: RankGroup) -> None:
        self.engine = EngineProcess(config.model, config.rollout)
        self.ranks = ranks
        self.version = 0
        self._config = config
        self._folder = settings.folder / "channels"
        self._redis_url = redis_url
        self.prompts = made_up_prompts(SAMPLED, 1127)

    def channel(self, name: Any, reader: str | None = None) -> WeightChannel:
        """One end of a channel; without a name of the reader the learner's."""
        weights = WeightsConfig(channel=name)
        return open_channel(weights, f"{RUN}-{name}", self._folder / name, redis_url=self._redis_url, reader=reader)

    async def transfer(self, name: str) -> Stages:
        """Send some versions through a channel while requests are in flight."""
        stages = Stages()
        publisher, reader = self.channel(name), self.channel(name, "actor")
        loop = EventLoop()
        others = [asyncio.create_task(loop.watch()), *(self._busy(number) for number in range(IN_THE_BACKGROUND))]
        before = self.engine.stats().update_seconds
        try:
            for _ in range(ROUNDS):
                await self._once(publisher, reader, stages)
        finally:
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await asyncio.to_thread(publisher.close_run)
            for end in (reader, publisher):
                await asyncio.to_thread(end.close)
        stages.stall = loop.stall
        stages.still = (self.engine.stats().update_seconds - before) / ROUNDS
        return stages

    async def _once(self, publisher: WeightChannel, reader: WeightChannel, stages: Stages) -> None:
        self.version += 1
        publication = Publication(publisher, self.ranks)
        began = time.perf_counter()
        await asyncio.to_thread(publication.begin, self.version)
        stages.idle.append(time.perf_counter() - began)
        announced = await asyncio.to_thread(self._await_announcement, reader)
        if isinstance(reader, StoringChannel):
            delivery = await asyncio.to_thread(reader.bring, announced)
            stages.announced.append(time.perf_counter() - began)
            await self.engine.load_delivery(delivery)
        else:
            stages.announced.append(time.perf_counter() - began)
            await WeightFollower(reader, self.engine, self._config.weights).first()
        stages.loaded.append(time.perf_counter() - began)
        await asyncio.to_thread(publication.wait)

    def _await_announcement(self, reader: WeightChannel) -> WeightVersion:
        """Wait for the newest version. Raises WeightsUnavailable."""
        deadline = time.monotonic() + self._config.weights.timeout_s
        while (newest := reader.latest()) is None or newest.version != self.version:
            if time.monotonic() > deadline:
                raise WeightsUnavailable(f"version {self.version} was not announced")
            time.sleep(POLL_S)
        return newest

    def _busy(self, number: int) -> asyncio.Task[None]:
        """Requests one after the other, until cancelled."""

        async def ask() -> None:
            while True:
                await self.engine.generate(self.prompts[0], temperature=1.0, max_tokens=12, seed=number)

        return asyncio.create_task(ask())

    async def gap(self) -> float:
        """Mean difference between what the engine samples now and the rank's policy, in nats."""
        samples = await asyncio.gather(
            *(
                self.engine.generate(prompt, temperature=1.0, max_tokens=SAMPLED.response, seed=number)
                for number, prompt in enumerate(self.prompts)
            )
        )
        rows: list[Response] = [response_of(*each) for each in zip(self.prompts, samples, strict=True)]
        return (await asyncio.to_thread(self.ranks.gap, rows))[1]


def every_channel(settings: Settings) -> Iterator[Row]:
    if not settings.dry and not cards():
        yield skipped("channels", CARD_NEEDED)
        return
    config = configured(settings)
    nbytes = sum(file.stat().st_size for file in config.model.path.glob("*.safetensors"))
    yield measured("weights, GB", nbytes / 1e9)
    yield measured("memcpy, GB/s", memcpy_gb_per_s(16 if settings.dry else 1024))
    data = settings.folder / "redis"
    data.mkdir()
    with EmbeddedRedis(data) as redis, cluster(object_store=2**30 + 4 * nbytes if not settings.dry else 200 * 2**20):
        ranks = start_ranks(config)
        try:
            with asyncio.Runner() as runner:
                yield from _measured(settings, Actor(settings, config, redis.url, ranks), runner, nbytes)
        finally:
            ranks.stop()


def _measured(settings: Settings, actor: Actor, runner: asyncio.Runner, nbytes: int) -> Iterator[Row]:
    with own_card():
        runner.run(actor.engine.start())
    work = changes(actor.ranks, configured(settings))
    try:
        for name in CHANNELS:
            if reason := lacking(name, cards()):
                yield skipped(name, reason)
                continue
            try:
                yield from through(name, actor, runner, work, nbytes)
            except Exception as error:  # of one channel; the others are measured all the same
                yield failed(name, f"{type(error).__name__}: {first_line(error)[:300]}")
    finally:
        runner.run(actor.engine.stop())


def lacking(name: str, count: int) -> str:
    """Why a channel cannot be used with so many cards, on which the engine has the second; empty if it can."""
    if name == "nccl" and count < 2:
        return f"needs two cards, there are {count}"
    if name == "ipc" and count != 1:
        return "needs one card that rank and engine share (CUDA_VISIBLE_DEVICES=0)"
    if name == "gloo" and count:
        return "is for engines on CPUs"
    return ""


def through(name: str, actor: Actor, runner: asyncio.Runner, work: Callable[[], None], nbytes: int) -> Iterator[Row]:
    """Change the weights, send them through a channel, and judge what arrives."""
    work()
    before = runner.run(actor.gap())
    stages = runner.run(actor.transfer(name))
    yield from judge_arrival(name, before, runner.run(actor.gap()))
    for stage in ("idle", "announced", "loaded"):
        yield measured(f"{name}: {TITLES[stage]}, s", median(getattr(stages, stage)))
    yield measured(f"{name}: loaded, GB/s", nbytes / 1e9 / median(stages.loaded))
    yield measured(f"{name}: engine stands still, s", stages.still)
    yield measured(f"{name}: actor's event loop late, s", stages.stall)


TITLES = {"idle": "learner waits", "announced": "announced or verified", "loaded": "loaded"}


def judge_arrival(name: str, before: float, after: float) -> Iterator[Row]:
    """Judge the gap between engine and rank (nats) before a transfer, of old weights, and after it."""
    yield at_least(f"{name}: gap before the transfer, nats", before, FLOOR / LEFT)
    yield at_most(f"{name}: gap after the transfer, nats", after, max(FLOOR, LEFT * before))


def changes(ranks: RankGroup, config: Config) -> Callable[[], None]:
    """A function that makes an update of the rank's weights, with a high learning rate."""
    groups = updates.made_up_groups(
        1, np.random.default_rng(0), 1127, prompt=(20, 40), response=(5, 10), steps=(2, 4), members=4
    )
    prepared = prepare(groups, config, 0, ranks.sharing)

    def change() -> None:
        ranks.update(prepared.work)

    return change


def configured(settings: Settings) -> Config:
    tree: dict[str, Any] = {
        "model": {
            "path": folder_of(settings),
            "dtype": settings.dtype,
            "max_prompt_tokens": 128,
            "max_response_tokens": 32,
        },
        "rollout": {"episodes_in_flight": IN_FLIGHT, "kv_cache_mib": 32, "gpu_memory_utilization": 0.3},
        "loss": {"kl_coef": 0.0, "importance_cap": None},
        "optimizer": {"lr": 5e-3},
        "learner": {"zero_stage": 2 if settings.dtype == "bfloat16" else 1},
    }
    return Config.model_validate(tree)


@contextmanager
def own_card() -> Iterator[None]:
    """The engine that starts meanwhile has the second card, where there are two; Ray gives the first to the rank."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if cards() >= 2:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[1] if visible else "1"
    try:
        yield
    finally:
        if visible is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


CHECKS = (every_channel,)
