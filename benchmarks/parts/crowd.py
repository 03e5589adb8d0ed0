"""Simulated rollout actors, many in one process: everything of a real one but the engine and the environment.

Leases, renewals, heartbeats, looks for new weights, encoding and storing are those of `actors.rollout_actor.Rollout`,
with a buffer and a weight channel of its own. An episode is a wait, as long as a recorded one took, after which a
trajectory as large as the recorded ones is stored.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from actors.engine.interface import EngineFailed, EngineStats, InferenceEngine, Sample
from actors.rollout_actor import Rollout
from benchmarks.parts.recorded import RECORDED, episode, kind_of
from services.buffer import Buffer, Stored
from services.buffer.connection import FEW
from services.buffer.owner import Owner
from services.config.tree import Config
from services.schemas import Ticket, Trajectory
from services.weights import Delivery, WeightVersion
from services.weights.directory import DirectoryChannel

if TYPE_CHECKING:
    import torch

THREADS = 32
END_S = 120.0


@dataclass(frozen=True, slots=True)
class Crowd:
    """What a process of simulated actors is built from.

    Attributes:
        config: the run's configuration as JSON.
        redis_url: of the run.
        owner: the run's hold on its name.
        first: number of the first actor.
        count: number of actors.
        pace: recorded times are multiplied by it.
    """

    config: str
    redis_url: str = field(repr=False)
    owner: Owner
    first: int
    count: int
    pace: float


@dataclass(slots=True)
class Figures:
    """What the actors of a process have seen since `begin`, and since their start.

    Attributes:
        lease_s, store_s: seconds of each call of the buffer that leased something, or stored a trajectory.
        idle: number of calls that leased nothing.
        looks: number of looks for a newer version.
        loads: locators of versions and when they were loaded, on the machine's monotonic clock.
        cpu_s: processor time of the process.
        results: how often `Buffer.store` returned what, since the start.
        outcomes: of the tickets, since the start.
    """

    lease_s: list[float] = field(default_factory=list)
    store_s: list[float] = field(default_factory=list)
    idle: int = 0
    looks: int = 0
    loads: list[tuple[str, float]] = field(default_factory=list)
    cpu_s: float = 0.0
    results: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)

    def begin(self) -> None:
        """Forget the times so far."""
        self.lease_s, self.store_s, self.loads = [], [], []
        self.idle = self.looks = 0
        self.cpu_s = -time.process_time()


_COUNTING = threading.Lock()
"""Actors call from many threads, and `+=` reads and writes in two steps. Lists need no lock."""


class TimedBuffer(Buffer):
    """A buffer whose calls are timed."""

    figures: Figures

    def lease(self, actor: str, limit: int, lease_s: float) -> list[Ticket]:
        began = time.perf_counter()
        tickets = super().lease(actor, limit, lease_s)
        if tickets:
            self.figures.lease_s.append(time.perf_counter() - began)
        else:
            with _COUNTING:
                self.figures.idle += 1
        return tickets

    def store(self, trajectory: Trajectory) -> Stored:
        began = time.perf_counter()
        stored = super().store(trajectory)
        self.figures.store_s.append(time.perf_counter() - began)
        with _COUNTING:
            self.figures.results[stored.value] += 1
        return stored


class CountingChannel(DirectoryChannel):
    """A weight channel whose looks are counted."""

    figures: Figures

    def latest(self) -> WeightVersion | None:
        with _COUNTING:
            self.figures.looks += 1
        return super().latest()


class SimulatedEngine(InferenceEngine):
    """Takes new versions and samples nothing."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self._version = 0

    @property
    def version(self) -> int:
        return self._version

    async def start(self) -> None:
        """There is no model to load."""

    async def generate(
        self, prompt_ids: Sequence[int], *, temperature: float, max_tokens: int, seed: int, stop: Sequence[str] = ()
    ) -> Sample:
        raise EngineFailed("a simulated engine samples nothing")

    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        raise EngineFailed("a simulated engine has no weights")

    async def load_delivery(self, delivery: Delivery) -> None:
        self._version = delivery.version.version
        self._figures.loads.append((delivery.version.locator, time.monotonic()))

    async def stop(self) -> None:
        """Nothing runs."""

    def stats(self) -> EngineStats:
        return EngineStats()


class SimulatedPlayer:
    """Plays a ticket by waiting as long as the recorded episode took.

    The first episodes end after a part of their time that grows with the number of their group, as in a run that has
    gone on for long. Otherwise all would end after the same few seconds.

    Args:
        actor: name of the actor.
        config: of the run.
        engine: of the actor; its version is that of the trajectories.
        pace: recorded times are multiplied by it.
    """

    def __init__(self, actor: str, config: Config, engine: SimulatedEngine, pace: float) -> None:
        self._actor = actor
        self._engine = engine
        self._pace = pace
        self._first_groups = config.rollout.actors * config.rollout.episodes_in_flight // config.learner.group_size

    @property
    def limit_s(self) -> float:
        return END_S + self._pace * max(kind.seconds for kind in RECORDED)

    async def start(self) -> None:
        """There is nothing to prepare."""

    async def play(self, ticket: Ticket) -> Trajectory:
        part = (ticket.group + 1) / self._first_groups if ticket.group < self._first_groups else 1.0
        await asyncio.sleep(self._pace * part * kind_of(ticket).seconds)
        return await asyncio.to_thread(episode, ticket, self._actor, self._engine.version)

    def room(self, free: int) -> int:
        return free

    def status(self) -> dict[str, object]:
        return {}

    async def close(self) -> None:
        """Nothing is held."""


def _actor(crowd: Crowd, config: Config, number: int, figures: Figures) -> Rollout:
    buffer = TimedBuffer.connect(
        crowd.redis_url,
        config.run.name,
        config.buffer,
        max_attempts=config.rollout.max_attempts,
        owner=crowd.owner,
        connections=FEW,
    )
    assert isinstance(buffer, TimedBuffer)
    channel = CountingChannel(config.run.folder / "weights", config.weights.timeout_s)
    buffer.figures = channel.figures = figures
    name, engine = f"{config.run.name}-rollout-{number}", SimulatedEngine(figures)
    return Rollout(
        name,
        config,
        engine=engine,
        environments={},
        player=lambda sampler: SimulatedPlayer(name, config, engine, crowd.pace),
        buffer=buffer,
        channel=channel,
    )


async def _play(crowd: Crowd, pipe: Connection) -> None:
    config, figures = Config.model_validate_json(crowd.config), Figures()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))
    numbers = range(crowd.first, crowd.first + crowd.count)
    actors = [await asyncio.to_thread(_actor, crowd, config, number, figures) for number in numbers]
    runs = [asyncio.create_task(actor.run()) for actor in actors]
    try:
        while (asked := await _asked(pipe, runs)) != "stop":
            if asked == "begin":
                figures.begin()
            else:
                figures.cpu_s += time.process_time()
                pipe.send(figures)
    finally:
        for actor in actors:
            await actor.drain()
        await asyncio.wait(runs, timeout=END_S)
    for run in runs:
        run.result()
    for actor in actors:
        figures.outcomes.update(actor._outcomes)
        actor._buffer.close()
    pipe.send(figures)


async def _asked(pipe: Connection, runs: Sequence[asyncio.Task[None]]) -> Any:
    """What the other end of the pipe asks next. Raises the error of an actor that ends before."""
    readable = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pipe.fileno(), readable.set)
    waiting = asyncio.create_task(readable.wait())
    try:
        await asyncio.wait([waiting, *runs], return_when=asyncio.FIRST_COMPLETED)
    finally:
        loop.remove_reader(pipe.fileno())
        waiting.cancel()
    for run in runs:
        if run.done():
            run.result()
    return pipe.recv()


def _main(crowd: Crowd, pipe: Connection) -> None:
    with contextlib.suppress(EOFError):  # the process that asks is gone
        asyncio.run(_play(crowd, pipe))


class Process:
    """A process of simulated actors, which ends with this one."""

    def __init__(self, crowd: Crowd) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_main, args=(crowd, other), daemon=True)
        self._process.start()
        other.close()

    def ask(self, what: str) -> None:
        """`begin` a measurement, `report` it, or `stop`."""
        self._pipe.send(what)

    def figures(self) -> Figures:
        """What `report` and `stop` are answered with. Raises RuntimeError if the process has ended."""
        if not self._pipe.poll(END_S):
            raise RuntimeError("simulated actors do not respond")
        try:
            found = self._pipe.recv()
        except EOFError:
            raise RuntimeError("simulated actors have ended; their error is above") from None
        assert isinstance(found, Figures)
        return found

    def end(self) -> None:
        """Wait for the end of a process that was told to stop, or end it."""
        self._process.join(END_S if self._process.is_alive() else 0)
        self._process.kill()
