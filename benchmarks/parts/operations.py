"""Processor time that Redis spends on each operation of the buffer, in a run of so many actors that stands still.

Every actor has a heartbeat and holds leases; as many tickets wait, and as many trajectories are stored. The times are
those of Redis' own process (INFO), so other work on the machine does not count.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace

from benchmarks.parts.recorded import episode
from services.buffer import Buffer
from services.config.tree import BufferConfig
from services.redis_server import EmbeddedRedis
from services.schemas import TRAIN_STREAM, Task, Ticket

GROUP = 8
LEASE_S = 3600.0
CALLS = 200
CHUNK = 4096
FACTS: dict[str, object] = {"state": "playing", "version": 7, "episodes": 64, "tokens_per_s": 812.5, "stored": 12345}
TASK = Task(env="alfworld", split="train", index=0)


def tickets(groups: range) -> list[Ticket]:
    """The tickets of some groups."""
    return [
        Ticket(group=group, member=member, group_size=GROUP, task=TASK, seed=GROUP * group + member)
        for group in groups
        for member in range(GROUP)
    ]


class Population:
    """A run of `actors` actors that play `episodes` episodes each."""

    def __init__(self, buffer: Buffer, actors: int, episodes: int) -> None:
        groups = actors * episodes // GROUP
        self._buffer = buffer
        issued = 2 * groups + max(groups, CALLS)
        for start in range(0, issued, CHUNK):
            buffer.issue(tickets(range(start, min(start + CHUNK, issued))))
        [one] = tickets(range(1))[:1]
        played = episode(one, "a", 0)
        for _ in range(groups):
            for ticket in buffer.lease("early", GROUP, LEASE_S):
                buffer.store(replace(played, ticket=ticket))
        self._held = [buffer.lease(f"a{number}", episodes, LEASE_S) for number in range(actors)]
        for number in range(actors):
            buffer.heartbeat(f"a{number}", FACTS, LEASE_S)
        self._upto = buffer.closed(TRAIN_STREAM, -1).upto

    def operations(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """Each operation of a run, by name."""
        buffer, held = self._buffer, [ticket.id for ticket in self._held[0]]
        yield "heartbeat", lambda: buffer.heartbeat("a0", FACTS, LEASE_S)
        yield "renewal of an actor's leases", lambda: buffer.renew("a0", held, LEASE_S)
        yield "look for expired leases", buffer.expire
        yield "learner's look for news", lambda: buffer.closed(TRAIN_STREAM, self._upto)
        yield "counts", buffer.stats
        yield "list of actors", buffer.actors
        yield "page of leases", lambda: buffer.leases(500)
        yield "lease and store of a trajectory", self._play
        buffer._cap_bytes = 0
        yield "look for a ticket above the cap", lambda: buffer.lease("late", 64, LEASE_S)

    def _play(self) -> None:
        (ticket,) = self._buffer.lease("playing", 1, LEASE_S)
        self._buffer.store(episode(ticket, "playing", 0))


def measure(server: EmbeddedRedis, actors: int, episodes: int) -> dict[str, float]:
    """Microseconds of Redis' processor time by operation."""
    buffer = Buffer.connect(server.url, f"operations-{uuid.uuid4().hex[:8]}", BufferConfig())
    population = Population(buffer, actors, episodes)
    found = {}
    for name, operation in population.operations():
        operation()
        before = _cpu_us(buffer)
        for _ in range(CALLS):
            operation()
        found[name] = (_cpu_us(buffer) - before) / CALLS
    buffer.remove(TRAIN_STREAM, sorted(buffer.known(TRAIN_STREAM)))
    buffer.close()
    return found


def _cpu_us(buffer: Buffer) -> float:
    info = buffer._connection.call(lambda: buffer._client.info("cpu"))
    return 1e6 * (float(info["used_cpu_user"]) + float(info["used_cpu_sys"]))
