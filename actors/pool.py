"""Supervisor of the actor pool, a Ray actor: keeps one rollout actor for each `rollout` resource of the cluster.

Invariants
- A rollout actor holds one `rollout` resource, so Ray itself never places more actors than there are resources, and the
  GPUs of its engine if the cluster has any. A requested pool size (`Buffer.set_desired_actors`) may be smaller.
- Nodes that join or leave, requests for another size and actors that die are handled alike: the next reconciliation
  compares what is running with what should be.
- An actor that is no longer wanted, or whose node is being drained because it was told to stop, is drained: its tickets
  go back at once. An actor that does not end in time is killed.
- In an existing cluster, a requested size is passed on to Ray's autoscaler, if it has one.
- An actor that has worked and stops sending heartbeats (its process hangs, its node is cut off) is killed.
- A replacement starts later after each crash in a row; the count restarts with an actor that had completed an episode.
  As long as one actor that has completed an episode is alive, crashing replacements do not fail the run.
- An actor that a plug-in of the run ended (a prompt template, a parser) fails the run at once: a replacement would call
  the same code.
- A rollout actor is only told to run and to drain: what it does is in its heartbeats in Redis.
- The supervisor runs on the node of the process that started it.

Example: 3 places, actor a1 crashes at once whenever it starts (`BACKOFF` begins with 0.5 s).

    s     running     event
    0     a0 a1 a2    a1 crashes, 1 in a row: next start in 0.5 s
    0.5   a0 a3 a2    a3 crashes, 2 in a row: next start in 1 s
    1.5   a0 a4 a2    a4 crashes, 3 in a row: `failing`, unless a0 or a2 has completed an episode
    4     a0 a5 a2    requested size 2: a5, the youngest, is drained
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
from services.backoff import Backoff
from services.buffer import Buffer
from services.buffer.owner import Owner
from services.config.tree import BufferConfig, Config, RolloutConfig
from services.errors import RedisUnavailable, RunStalled, first_line
from services.plugins import PluginError

logger = logging.getLogger(__name__)

RESOURCE = "rollout"
RECONCILE_S = 0.5
BACKOFF = Backoff(0.5, 30.0)
SETTLED_S = 60.0
FAILING_CRASHES = 3
DRAIN_S = 15.0
MISSED_HEARTBEATS = 60
"""Reconciliations in a row without a heartbeat, which lives ten seconds in Redis, after which an actor is killed."""
PATIENCE = BufferConfig(timeout_s=2.0, reconnect_s=2.0)
"""Short: without Redis the supervisor continues with the last requested size."""


@dataclass(slots=True)
class Member:
    """A rollout actor that the pool has started.

    Attributes:
        name: of the actor, in leases and heartbeats.
        handle: of the Ray actor.
        run: ends with the actor.
        placed: id of its node, once Ray has placed it.
        started: when, on the monotonic clock.
        worked: whether it has completed an episode.
        missed: reconciliations in a row without a heartbeat.
        drain_by: when it is killed, on the monotonic clock; None while it is wanted.
    """

    name: str
    handle: Any
    run: asyncio.Future[None]
    placed: asyncio.Future[str]
    started: float
    worked: bool = False
    missed: int = 0
    drain_by: float | None = None


class Pool:
    """Keeps the rollout actors running. Call `run` once; this becomes a Ray actor.

    Args:
        spec: what the rollout actors are built from.
    """

    def __init__(self, spec: RolloutSpec) -> None:
        config = Config.model_validate_json(spec.config)
        logging.basicConfig(level=config.telemetry.log_level)
        self._run_name = config.run.name
        self._rollout = config.rollout
        self._spec = spec
        # Other names than those of an earlier supervisor's actors, because leases and heartbeats go by name.
        self._generation = uuid.uuid4().hex[:6]
        self._numbers = itertools.count()
        self._members: list[Member] = []
        self._requested = spec.default_actors
        self._asked_autoscaler: int | None = None
        self._buffer: Buffer | None = None
        self._wanted = 0
        self._crashes = 0
        self._crashes_in_a_row = 0
        self._last_error: str | None = None
        self._plugin_error: str | None = None
        self._not_before = 0.0
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Reconcile the pool twice a second until `stop`."""
        try:
            while not self._stopping.is_set():
                try:
                    await self._reconcile()
                except Exception:  # such as a temporary failure of Ray: without a supervisor the pool never recovers
                    logger.exception("pool reconciliation failed; retrying")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RECONCILE_S):
                        await self._stopping.wait()
        finally:
            if self._buffer is not None:
                self._buffer.close()

    async def stop(self) -> None:
        """Drain every actor, then end it. Returns when all have ended, within `DRAIN_S`."""
        self._stopping.set()
        members, self._members = self._members, []
        if members:
            for member in members:
                member.handle.drain.remote()
            await asyncio.wait([member.run for member in members], timeout=DRAIN_S)
        for member in members:
            _kill(member)
        if self._asked_autoscaler is not None:
            await asyncio.to_thread(_request_places, 0)

    async def status(self) -> dict[str, object]:
        """Return the pool's state as plain JSON data: wanted and running actors, crashes, and the last one's reason.

        `failing` is the reason if a plug-in ended an actor, or if `FAILING_CRASHES` actors in a row have crashed early
        and no running one has completed an episode; else None.
        """
        failing = self._crashes_in_a_row >= FAILING_CRASHES and not any(member.worked for member in self._members)
        return {
            "wanted": self._wanted,
            "actors": [member.name for member in self._members if member.drain_by is None],
            "draining": [member.name for member in self._members if member.drain_by is not None],
            "deaths": self._crashes,
            "deaths_in_a_row": self._crashes_in_a_row,
            "last_error": self._last_error,
            "failing": self._plugin_error or (self._last_error if failing else None),
        }

    async def _reconcile(self) -> None:
        """Compare the pool with what it should be; start, drain and remove actors accordingly."""
        await self._update_from_redis()
        places, leaving = await asyncio.to_thread(_rollout_places)
        self._wanted = places if self._requested is None else min(places, self._requested)
        self._remove_ended()
        if not self._stopping.is_set():
            await self._request_from_autoscaler()
            self._drain_leaving(leaving)
            self._drain_surplus()
            self._start_missing()

    async def _update_from_redis(self) -> None:
        """Read the requested size and the actors' heartbeats; kill actors that have missed too many."""
        try:
            requested, heartbeats = await asyncio.to_thread(self._read_redis)
        except RedisUnavailable as error:
            logger.warning("pool keeps its size: %s", error)
            return
        self._requested = self._spec.default_actors if requested is None else requested
        for member in self._members:
            heartbeat = heartbeats.get(member.name)
            member.worked = member.worked or bool(heartbeat and heartbeat.get("stored"))
            # One that has not worked yet may be loading its model, which takes minutes.
            member.missed = 0 if heartbeat or not member.worked else member.missed + 1
            if member.missed == MISSED_HEARTBEATS:
                logger.warning("killing rollout actor %s: no heartbeat", member.name)
                _kill(member)

    def _read_redis(self) -> tuple[int | None, dict[str, dict[str, object]]]:
        if self._buffer is None:
            self._buffer = Buffer.connect(self._spec.redis_url, self._run_name, PATIENCE)
        return self._buffer.desired_actors(), self._buffer.actors()

    def _remove_ended(self) -> None:
        """Remove actors that have ended; after a crash delay the next start."""
        now = time.monotonic()
        for member in [member for member in self._members if member.run.done()]:
            self._members.remove(member)
            _kill(member)
            if member.drain_by is not None:
                logger.info("rollout actor %s drained", member.name)
                continue
            error = member.run.exception()
            self._last_error = _reason(error) if error else "it ended"
            if error and isinstance(_cause(error), PluginError):
                self._plugin_error = self._last_error
            self._crashes += 1
            settled = member.worked or now - member.started > SETTLED_S
            self._crashes_in_a_row = 1 if settled else self._crashes_in_a_row + 1
            delay = BACKOFF.delay(self._crashes_in_a_row)
            self._not_before = now + delay
            logger.warning("rollout actor %s crashed: %s; next start in %.1f s", member.name, self._last_error, delay)

    async def _request_from_autoscaler(self) -> None:
        """Ask Ray's autoscaler for the requested places, once for each size. A cluster of the run's own has none."""
        if self._spec.default_actors is None and self._requested != self._asked_autoscaler:
            await asyncio.to_thread(_request_places, self._requested or 0)
            self._asked_autoscaler = self._requested

    def _drain_leaving(self, leaving: set[str]) -> None:
        """Drain actors whose nodes are being drained; `leaving`: ids of these nodes."""
        for member in self._members:
            if member.drain_by is None and _node(member) in leaving:
                logger.info("draining rollout actor %s: its node is leaving", member.name)
                _drain(member)

    def _drain_surplus(self) -> None:
        """Drain actors beyond the wanted number: those not placed yet first, then the youngest. Kill overdue ones."""
        wanted = [member for member in self._members if member.drain_by is None]
        by_age = sorted(wanted, key=lambda member: (not member.placed.done(), member.started), reverse=True)
        for member in by_age[: max(0, len(wanted) - self._wanted)]:
            logger.info("draining rollout actor %s: no longer wanted", member.name)
            _drain(member)
        for member in self._members:
            if member.drain_by is not None and time.monotonic() > member.drain_by:
                _kill(member)

    def _start_missing(self) -> None:
        """Start missing actors. Ray places them once actors that are being drained have freed their resources."""
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
        placed.add_done_callback(lambda future: future.cancelled() or future.exception())  # the same error ends `run`
        return Member(name, handle, run, placed, time.monotonic())


def engine_gpus(config: RolloutConfig, resources: Mapping[str, float]) -> int:
    """Number of GPUs that an engine holds in a cluster with these resources.

    Raises:
        RunStalled: the cluster has GPUs, but too few for one engine.
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
    agent_token: str | None = None,
) -> tuple[Any, Any]:
    """Start the supervisor in the connected Ray cluster.

    End it with `ray.get(handle.stop.remote())`, then `ray.kill(handle)`.

    Args:
        config: of the run.
        redis_url: may contain a password.
        env_urls: addresses of the servers, by environment.
        env_token: bearer token of the environment servers.
        engine: makes the inference engine of an actor.
        default_actors: pool size if none was requested; None: as many as there are places.
        owner: the run's hold on its name in Redis, for its actors.
        agent_token: bearer token of outside services that play episodes.

    Returns:
        Handle of the supervisor, and a reference that is ready when it ends.

    Raises:
        RunStalled: the cluster has GPUs, but too few for one engine.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    gpus = engine_gpus(config.rollout, ray.cluster_resources())
    spec = RolloutSpec(
        config.model_dump_json(), redis_url, env_urls, env_token, engine, default_actors, gpus, owner, agent_token
    )
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    handle = ray.remote(Pool).options(num_cpus=0, max_concurrency=8, scheduling_strategy=here).remote(spec)
    return handle, handle.run.remote()


def _rollout_places() -> tuple[int, set[str]]:
    """Number of places on the nodes that stay, and ids of the nodes that are being drained."""
    import ray
    from ray._private.state import state  # no public API says which nodes are being drained

    leaving = set(state.get_draining_nodes())
    staying = (node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving)
    return sum(int(resources.get(RESOURCE, 0)) for resources in staying), leaving


def _request_places(count: int) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[{RESOURCE: 1}] * count)


def _node(member: Member) -> str | None:
    """Id of the actor's node; None if it has not been placed, or has died."""
    placed = member.placed
    return None if not placed.done() or placed.cancelled() or placed.exception() else placed.result()


def _drain(member: Member) -> None:
    """Tell an actor to drain; end one that has not been placed at once."""
    member.drain_by = time.monotonic() + DRAIN_S
    if member.placed.done():
        member.handle.drain.remote()
    else:
        _kill(member)


def _kill(member: Member) -> None:
    import ray

    ray.kill(member.handle)


def _cause(error: BaseException) -> BaseException:
    """What the actor itself raised; Ray's error if its process is gone."""
    return getattr(error, "cause", None) or error


def _reason(error: BaseException) -> str:
    """The error as one line."""
    return first_line(_cause(error))
