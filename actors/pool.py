"""The pool's supervisor, a Ray actor: one rollout actor for each `rollout` resource of the cluster, dead ones replaced.

Invariants
- A rollout actor holds one `rollout` resource, so Ray itself never places more of them than there are.
- Nodes that join or leave are the same event as actors that die: the next look at the cluster sets it right.
- A replacement waits longer after each death in a row; an actor that lived long enough starts the count anew.
- Nothing is asked of a rollout actor but to run and to drain: what it does is in its heartbeats in Redis.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from dataclasses import dataclass
from typing import Any

from actors.engine_vllm import engine_environment
from actors.rollout_process import EngineFactory, RolloutProcess, RolloutSpec, vllm_engine
from services.config.tree import Config

logger = logging.getLogger(__name__)

RESOURCE = "rollout"
LOOK_S = 0.5
FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0
SETTLED_S = 60.0
DRAIN_S = 15.0


@dataclass(slots=True)
class Member:
    """A rollout actor that the pool has started, waiting for a place or running."""

    name: str
    handle: Any
    run: asyncio.Future[None]
    started: float


class Pool:
    """Keeps the rollout actors running. `run` once, as a task of the Ray actor this becomes."""

    def __init__(self, spec: RolloutSpec) -> None:
        config = Config.model_validate_json(spec.config)
        logging.basicConfig(level=config.telemetry.log_level)
        self._run_name = config.run.name
        self._spec = spec
        self._numbers = itertools.count()
        self._members: list[Member] = []
        self._wanted = 0
        self._deaths = 0
        self._deaths_in_a_row = 0
        self._last_error: str | None = None
        self._not_before = 0.0
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Look after the actors until `stop`."""
        while not self._stopping.is_set():
            self._wanted = await asyncio.to_thread(_rollout_resources)
            self._bury()
            self._fill()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), LOOK_S)

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

    async def status(self) -> dict[str, object]:
        """JSON-able facts: wanted and living actors, deaths, and why the last one died."""
        return {
            "wanted": self._wanted,
            "actors": [member.name for member in self._members],
            "deaths": self._deaths,
            "deaths_in_a_row": self._deaths_in_a_row,
            "last_error": self._last_error,
        }

    def _bury(self) -> None:
        now = time.monotonic()
        for member in [member for member in self._members if member.run.done()]:
            self._members.remove(member)
            _kill(member)
            error = member.run.exception()
            self._last_error = _reason(error) if error else "it ended"
            self._deaths += 1
            self._deaths_in_a_row = 1 if now - member.started > SETTLED_S else self._deaths_in_a_row + 1
            delay = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** (self._deaths_in_a_row - 1))
            self._not_before = now + delay
            logger.warning("rollout actor %s died: %s; next start in %.1f s", member.name, self._last_error, delay)

    def _fill(self) -> None:
        """Start what is missing. When nodes have left there may be too many for now: those wait for a place."""
        if time.monotonic() >= self._not_before:
            while len(self._members) < self._wanted:
                self._members.append(self._start())

    def _start(self) -> Member:
        import ray

        number = next(self._numbers)
        name = f"{self._run_name}-rollout-{number}"
        actor = ray.remote(RolloutProcess).options(
            num_cpus=0,
            resources={RESOURCE: 1},
            max_restarts=0,
            max_concurrency=8,
            runtime_env={"env_vars": engine_environment()},
        )
        handle = actor.remote(name, number, self._spec)
        logger.info("rollout actor %s started", name)
        return Member(name, handle, asyncio.wrap_future(handle.run.remote().future()), time.monotonic())


def start_pool(
    config: Config,
    *,
    redis_url: str,
    env_urls: tuple[str, ...],
    env_token: str | None = None,
    engine: EngineFactory = vllm_engine,
) -> tuple[Any, Any]:
    """Start the supervisor in the connected Ray cluster: its handle, and the reference that ends when it does.

    End it with `ray.get(handle.stop.remote())`, then `ray.kill(handle)`.
    """
    import ray

    spec = RolloutSpec(config.model_dump_json(), redis_url, env_urls, env_token, engine)
    handle = ray.remote(Pool).options(num_cpus=0, max_concurrency=8).remote(spec)
    return handle, handle.run.remote()


def _rollout_resources() -> int:
    import ray

    return int(ray.cluster_resources().get(RESOURCE, 0))


def _kill(member: Member) -> None:
    import ray

    ray.kill(member.handle)


def _reason(error: BaseException) -> str:
    """One line: the error's own message where the actor raised it, Ray's where the process is gone."""
    cause = getattr(error, "cause", None) or error
    return str(cause).strip().partition("\n")[0] or type(cause).__name__
