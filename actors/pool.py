"""The pool's supervisor, a Ray actor: one rollout actor for each `rollout` resource of the cluster, dead ones replaced.

Invariants
- A rollout actor holds one `rollout` resource, so Ray itself never places more of them than there are, and where the
  cluster has GPUs those of its engine. A wish (`Buffer.set_desired_actors`) may ask for fewer.
- Nodes that join or leave and wishes are the same event as actors that die: the next look sets it right.
- An actor that is no longer wanted, or whose node is being drained since it was told to stop, is drained: its tickets
  go back at once. One that does not end in time is killed.
- In a cluster that was there before, a wish is passed on to Ray's autoscaler, if it has one.
- An actor that has worked and falls silent (a process that hangs, a node that is cut off) is killed.
- A replacement waits longer after each death in a row; an actor that had finished an episode starts the count anew.
  While one lives that has, replacements may die as they like: the run goes on with what there is.
- Nothing is asked of a rollout actor but to run and to drain: what it does is in its heartbeats in Redis.
- The supervisor lives on the node of the process that started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actors.rollout_process import EngineFactory, RolloutProcess, RolloutSpec, vllm_engine
from services.buffer import Buffer
from services.buffer.owner import Owner
from services.config.tree import BufferConfig, Config, RolloutConfig
from services.errors import RedisUnavailable, RunStalled, first_line

logger = logging.getLogger(__name__)

RESOURCE = "rollout"
LOOK_S = 0.5
FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0
SETTLED_S = 60.0
HOPELESS_DEATHS = 3
DRAIN_S = 15.0
SILENT_LOOKS = 60
"""Looks at Redis in a row without a heartbeat, which lives for ten seconds, after which an actor is given up."""
PATIENCE = BufferConfig(timeout_s=2.0, reconnect_s=2.0)
"""The supervisor does not wait for Redis: it goes on with the last wish it knows."""


@dataclass(slots=True)
class Member:
    """A rollout actor that the pool has started.

    Attributes:
        run: ends when it does. placed: its node's id, once Ray has found a place for it.
        worked: it has finished an episode.
        silent: looks without a heartbeat in a row.
        drain_by: time after which it is killed; None while it is wanted.
    """

    name: str
    handle: Any
    run: asyncio.Future[None]
    placed: asyncio.Future[str]
    started: float
    worked: bool = False
    silent: int = 0
    drain_by: float | None = None


class Pool:
    """Keeps the rollout actors running. `run` once, as a task of the Ray actor this becomes."""

    def __init__(self, spec: RolloutSpec) -> None:
        config = Config.model_validate_json(spec.config)
        logging.basicConfig(level=config.telemetry.log_level)
        self._run_name = config.run.name
        self._rollout = config.rollout
        self._spec = spec
        # Not the names of an earlier supervisor's actors: leases and heartbeats go by name.
        self._generation = uuid.uuid4().hex[:6]
        self._numbers = itertools.count()
        self._members: list[Member] = []
        self._wish = spec.default_actors
        self._asked: int | None = None
        self._buffer: Buffer | None = None
        self._wanted = 0
        self._deaths = 0
        self._deaths_in_a_row = 0
        self._last_error: str | None = None
        self._not_before = 0.0
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Look after the actors until `stop`."""
        try:
            while not self._stopping.is_set():
                try:
                    await self._look()
                except Exception:  # a hiccup of Ray's: without its supervisor the pool would not heal again
                    logger.exception("the pool could not be looked after, it is tried again")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await self._stopping.wait()
        finally:
            if self._buffer is not None:
                self._buffer.close()

    async def stop(self) -> None:
        """Drain every actor, then end it. Returns when all are gone, within `DRAIN_S`."""
        self._stopping.set()
        members, self._members = self._members, []
        if members:
            for member in members:
                member.handle.drain.remote()
            await asyncio.wait([member.run for member in members], timeout=DRAIN_S)
        for member in members:
            _kill(member)
        if self._asked is not None:
            await asyncio.to_thread(_request_places, 0)

    async def status(self) -> dict[str, object]:
        """JSON-able facts: wanted and living actors, deaths, and why the last one died.

        `failing`: why, when `HOPELESS_DEATHS` in a row have died early and none that lives has finished an episode.
        """
        hopeless = self._deaths_in_a_row >= HOPELESS_DEATHS and not any(member.worked for member in self._members)
        return {
            "wanted": self._wanted,
            "actors": [member.name for member in self._members if member.drain_by is None],
            "draining": [member.name for member in self._members if member.drain_by is not None],
            "deaths": self._deaths,
            "deaths_in_a_row": self._deaths_in_a_row,
            "last_error": self._last_error,
            "failing": self._last_error if hopeless else None,
        }

    async def _look(self) -> None:
        await self._ask_redis()
        places, leaving = await asyncio.to_thread(_rollout_places)
        self._wanted = places if self._wish is None else min(places, self._wish)
        self._bury()
        if not self._stopping.is_set():
            await self._ask_autoscaler()
            self._drain_leaving(leaving)
            self._drain_surplus()
            self._fill()

    async def _ask_redis(self) -> None:
        """What is wished for, and which actors have finished an episode."""
        try:
            wish, facts = await asyncio.to_thread(self._read_redis)
        except RedisUnavailable as error:
            logger.warning("the pool goes on as it is: %s", error)
            return
        self._wish = self._spec.default_actors if wish is None else wish
        for member in self._members:
            heartbeat = facts.get(member.name)
            member.worked = member.worked or bool(heartbeat and heartbeat.get("stored"))
            member.silent = 0 if heartbeat or not member.worked else member.silent + 1
            if member.silent == SILENT_LOOKS:
                logger.warning("rollout actor %s is silent and is killed", member.name)
                _kill(member)

    def _read_redis(self) -> tuple[int | None, dict[str, dict[str, object]]]:
        if self._buffer is None:
            self._buffer = Buffer.connect(self._spec.redis_url, self._run_name, PATIENCE)
        return self._buffer.desired_actors(), self._buffer.actors()

    def _bury(self) -> None:
        now = time.monotonic()
        for member in [member for member in self._members if member.run.done()]:
            self._members.remove(member)
            _kill(member)
            if member.drain_by is not None:
                logger.info("rollout actor %s is drained", member.name)
                continue
            error = member.run.exception()
            self._last_error = _reason(error) if error else "it ended"
            self._deaths += 1
            settled = member.worked or now - member.started > SETTLED_S
            self._deaths_in_a_row = 1 if settled else self._deaths_in_a_row + 1
            delay = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** (self._deaths_in_a_row - 1))
            self._not_before = now + delay
            logger.warning("rollout actor %s died: %s; next start in %.1f s", member.name, self._last_error, delay)

    async def _ask_autoscaler(self) -> None:
        """Have it keep places for the wish. In a cluster of the run's own nobody listens, so nobody is asked."""
        if self._spec.default_actors is None and self._wish != self._asked:
            await asyncio.to_thread(_request_places, self._wish or 0)
            self._asked = self._wish

    def _drain_leaving(self, leaving: set[str]) -> None:
        for member in self._members:
            if member.drain_by is None and _node(member) in leaving:
                logger.info("the node of rollout actor %s is leaving", member.name)
                _drain(member)

    def _drain_surplus(self) -> None:
        """Those that wait for a place go first, then the youngest."""
        wanted = [member for member in self._members if member.drain_by is None]
        by_age = sorted(wanted, key=lambda member: (not member.placed.done(), member.started), reverse=True)
        for member in by_age[: max(0, len(wanted) - self._wanted)]:
            logger.info("rollout actor %s is no longer wanted", member.name)
            _drain(member)
        for member in self._members:
            if member.drain_by is not None and time.monotonic() > member.drain_by:
                _kill(member)

    def _fill(self) -> None:
        """Start what is missing; Ray finds it a place when one that is being drained has left its own."""
        if time.monotonic() >= self._not_before:
            wanted = [member for member in self._members if member.drain_by is None]
            self._members += [self._start() for _ in range(self._wanted - len(wanted))]

    def _start(self) -> Member:
        import ray

        name = f"{self._run_name}-rollout-{self._generation}-{next(self._numbers)}"
        actor = ray.remote(RolloutProcess).options(
            num_cpus=0,
            num_gpus=self._spec.gpus,
            resources={RESOURCE: 1},
            max_restarts=0,
            max_concurrency=8,
        )
        handle = actor.remote(name, self._spec)
        logger.info("rollout actor %s started", name)
        run, placed = (asyncio.wrap_future(method.remote().future()) for method in (handle.run, handle.node))
        placed.add_done_callback(lambda future: future.cancelled() or future.exception())  # `run` tells of it
        return Member(name, handle, run, placed, time.monotonic())


def engine_gpus(config: RolloutConfig, resources: Mapping[str, float]) -> int:
    """GPUs that an engine holds in a cluster with these resources.

    Raises:
        RunStalled: no engine could ever start.
    """
    there = resources.get("GPU", 0)
    if there == 0:
        return 0
    if there < config.tensor_parallel:
        raise RunStalled(f"rollout.tensor_parallel={config.tensor_parallel}: the Ray cluster has {there:g} GPU(s)")
    return 0 if config.share_gpus else config.tensor_parallel


def start_pool(
    config: Config,
    *,
    redis_url: str,
    env_urls: Mapping[str, tuple[str, ...]],
    env_token: str | None = None,
    engine: EngineFactory = vllm_engine,
    default_actors: int | None = None,
    owner: Owner | None = None,
) -> tuple[Any, Any]:
    """Start the supervisor in the connected Ray cluster: its handle, and the reference that ends when it does.

    `default_actors`: how many without a wish; None: as many as there are places. `owner`: of the run, for its actors.
    End it with `ray.get(handle.stop.remote())`, then `ray.kill(handle)`.

    Raises:
        RunStalled: the cluster has GPUs, but too few for one engine.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    gpus = engine_gpus(config.rollout, ray.cluster_resources())
    spec = RolloutSpec(config.model_dump_json(), redis_url, env_urls, env_token, engine, default_actors, gpus, owner)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    handle = ray.remote(Pool).options(num_cpus=0, max_concurrency=8, scheduling_strategy=here).remote(spec)
    return handle, handle.run.remote()


def _rollout_places() -> tuple[int, set[str]]:
    """Places on the nodes that stay, and the ids of the nodes that are being drained."""
    import ray
    from ray._private.state import state  # there is no public way to ask which nodes are being drained

    leaving = set(state.get_draining_nodes())
    staying = (node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving)
    return sum(int(resources.get(RESOURCE, 0)) for resources in staying), leaving


def _request_places(count: int) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[{RESOURCE: 1}] * count)


def _node(member: Member) -> str | None:
    """Id of its node; None where it has none yet, or has died."""
    placed = member.placed
    return None if not placed.done() or placed.cancelled() or placed.exception() else placed.result()


def _drain(member: Member) -> None:
    member.drain_by = time.monotonic() + DRAIN_S
    if member.placed.done():
        member.handle.drain.remote()
    else:
        _kill(member)


def _kill(member: Member) -> None:
    import ray

    ray.kill(member.handle)


def _reason(error: BaseException) -> str:
    """One line: the error's own message where the actor raised it, Ray's where the process is gone."""
    cause = getattr(error, "cause", None) or error
    return first_line(cause)
